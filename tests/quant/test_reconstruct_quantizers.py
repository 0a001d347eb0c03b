"""The learning quantizers against closed forms in float64, torch's own gradients, and the compiled loops against the torch ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zsq_deploy.quant.fakequant import fake_quant
from zsq_deploy.quant.reconstruct import native
from zsq_deploy.quant.reconstruct.learn import block_loss, draws, mixed, word
from zsq_deploy.quant.reconstruct.quantizers import (
    Range,
    RoundedWeight,
    dropped,
    initial_logits,
    rectified_sigmoid,
    round_activation,
    weight_scales,
)
from zsq_deploy.quant.scheme import Granularity, Scheme


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def plain_weight(v, scale, base, low, high, strength, beta):
    """The soft weight and the regulariser as the papers write them, for torch to differentiate."""
    h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0.0, 1.0)
    w = torch.clamp(base + h, low, high) * scale
    return w, strength * (1.0 - (2.0 * h - 1.0).abs() ** beta).sum()


@pytest.mark.parametrize(("strength", "beta"), [(0.0, 2.0), (0.3, 2.0), (1.0, 7.5), (0.7, 20.0)])
def test_gradients_of_the_soft_weight_are_those_of_the_written_formula(strength, beta):
    v = (3 * normal(5, 4, 3, 3)).requires_grad_()
    scale = (0.1 + normal(5, 1, 1, 1, seed=1).abs()).requires_grad_()
    base = torch.floor(4 * normal(5, 4, 3, 3, seed=2))
    away = normal(5, 4, 3, 3, seed=3)
    w, extra = plain_weight(v, scale, base, -4, 3, strength, beta)
    expected = torch.autograd.grad((w * away).sum() + extra, (v, scale))
    mine = RoundedWeight.apply(v, scale, base, -4, 3, strength, beta)
    found = torch.autograd.grad((mine * away).sum(), (v, scale))
    torch.testing.assert_close(mine, w, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (expected[0] == 0).any()
    assert (expected[0] != 0).any()


def test_numeric_gradient_of_the_soft_weight():
    v = (0.8 * normal(3, 4)).requires_grad_()
    scale = (0.2 + normal(3, 1, seed=1).abs()).requires_grad_()
    base = torch.floor(normal(3, 4, seed=2))
    assert torch.autograd.gradcheck(lambda a, b: RoundedWeight.apply(a, b, base, -8, 7, 0.0, 2.0), (v, scale))


def test_the_soft_weight_starts_as_the_float_weight():
    w = normal(6, 5, seed=4)
    scale = torch.full((6, 1), 0.25, dtype=torch.float64)
    base, v = initial_logits(w, scale)
    soft = RoundedWeight.apply(v, scale, base, -100, 100, 0.0, 2.0)
    torch.testing.assert_close(soft, w, rtol=0, atol=1e-12)
    assert bool(((rectified_sigmoid(v) >= 0.5) == (torch.frac(w / scale) % 1 >= 0.5)).float().mean() > 0.95)


def lsq_by_hand(x, s, limits, g):
    """Equations 3 and 5 of the LSQ paper, element by element."""
    d_x, d_s = np.zeros_like(x), 0.0
    for i, value in np.ndenumerate(x):
        code = np.rint(value / s)
        if code < limits.low:
            d_s += g[i] * limits.low
        elif code > limits.high:
            d_s += g[i] * limits.high
        else:
            d_x[i] = g[i]
            d_s += g[i] * (code - value / s)
    return d_x, d_s


@pytest.mark.parametrize("limits", [Range(0, 15), Range(-3, 4), Range(-8, 7)])
def test_gradients_of_a_rounded_activation_are_those_of_lsq(limits):
    x = (6 * normal(3, 4, 5, 5)).requires_grad_()
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    g = normal(3, 4, 5, 5, seed=1)
    y = round_activation(x, s, limits)
    d_x, d_s = torch.autograd.grad((y * g).sum(), (x, s))
    by_hand = lsq_by_hand(x.detach().numpy(), 0.7, limits, g.numpy())
    np.testing.assert_allclose(d_x.numpy(), by_hand[0], rtol=0, atol=0)
    np.testing.assert_allclose(float(d_s), by_hand[1], rtol=1e-12)
    other = fake_quant(x, s, torch.zeros((), dtype=torch.float64), limits.low, limits.high)
    torch.testing.assert_close(y, other, rtol=0, atol=0)
    expected = torch.autograd.grad((other * g).sum(), (x, s))
    torch.testing.assert_close(d_x, expected[0])
    torch.testing.assert_close(d_s, expected[1])


def test_dropped_elements_are_those_of_the_float_network_and_teach_the_scale_nothing():
    limits = Range(0, 7, floor=0.0, ceiling=6.0)
    x = (8 * normal(4, 8, 3, 3, seed=2)).requires_grad_()
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    mask = torch.from_numpy(dropped(x.numel(), 77, 0.5)).reshape(x.shape)
    y = round_activation(x, s, limits, 0.5, 77)
    with torch.no_grad():
        torch.testing.assert_close(y[mask], x.clamp(0.0, 6.0)[mask], rtol=0, atol=0)
        torch.testing.assert_close(y[~mask], round_activation(x, s, limits)[~mask], rtol=0, atol=0)
    g = normal(4, 8, 3, 3, seed=3)
    d_x, d_s = torch.autograd.grad((y * g).sum(), (x, s))
    kept = torch.where(mask, torch.zeros_like(g), g)
    _, by_hand = lsq_by_hand(x.detach().numpy(), 0.5, limits, kept.numpy())
    np.testing.assert_allclose(float(d_s), by_hand, rtol=1e-12)
    inside = (x > 0) & (x < 6)
    torch.testing.assert_close(d_x[mask], (g * inside)[mask])


def test_the_random_mask_has_the_share_asked_for_and_depends_on_the_key_alone():
    for share in (0.1, 0.5, 0.9):
        mask = dropped(200_000, 5, share)
        assert abs(mask.mean() - share) < 0.005
    first, second = dropped(100_000, 1, 0.5), dropped(100_000, 2, 0.5)
    assert abs((first == second).mean() - 0.5) < 0.01
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.01
    np.testing.assert_array_equal(first, dropped(100_000, 1, 0.5))
    assert len({word(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000


@pytest.mark.skipif(native.kernels() is None, reason="there is no C compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["planes", "channels last", "matrix"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_compiled_loops_equal_the_torch_ones(monkeypatch, layout, share, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = (700, 131) if layout == "matrix" else (8, 24, 19, 23)
        x = 3 * normal(*shape, seed=5, dtype=torch.float32)
        g = normal(*shape, seed=6, dtype=torch.float32)
        if layout == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        limits = Range(-2, 13, -0.5, 2.0)

        def both():
            a = x.clone().requires_grad_()
            s = torch.tensor(0.21, requires_grad=True)
            y = round_activation(a, s, limits, share, 9)
            return y.detach(), *torch.autograd.grad(y, (a, s), g)

        fast = both()
        chosen = mixed(x, 2 * x, 0.3, 4)
        monkeypatch.setattr("zsq_deploy.quant.reconstruct.quantizers.kernels", lambda: None)
        monkeypatch.setattr("zsq_deploy.quant.reconstruct.learn.kernels", lambda: None)
        slow = both()
        assert torch.equal(fast[0], slow[0])
        assert fast[0].stride() == x.stride()
        assert torch.equal(fast[1], slow[1])
        torch.testing.assert_close(fast[2], slow[2], rtol=1e-4, atol=1e-2)
        assert torch.equal(chosen, mixed(x, 2 * x, 0.3, 4))
    finally:
        torch.set_num_threads(before)


def test_weight_scales_beat_every_other_clip_ratio_and_live_with_dead_channels():
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, size=(6, 40)).astype(np.float32)
    w[3] = 0
    scheme = Scheme(4, granularity=Granularity.CHANNEL)
    scale, zero = weight_scales(w, scheme, 0, power=2.4, candidates=100)
    assert scale.shape == zero.shape == (6,)
    assert (zero == 0).all()

    def loss(row, s):
        return (np.abs(np.clip(np.rint(row / s), -8, 7) * s - row) ** 2.4).mean()

    for index in (0, 1, 2, 4, 5):
        row = w[index].astype(np.float64)
        best = min(loss(row, np.abs(row).max() * r / 7) for r in np.linspace(0.05, 1.15, 400))
        assert loss(row, float(scale[index])) < 1.1 * best
    assert scale[3] == np.median(scale[[0, 1, 2, 4, 5]])


def test_images_are_drawn_evenly_and_by_the_seed():
    chosen = list(draws(50, 8, 100, seed=3))
    counts = np.bincount(np.concatenate(chosen), minlength=50)
    assert counts.min() >= 800 // 50 - 1
    assert counts.max() <= 800 // 50 + 1
    assert all(len(np.unique(step)) == len(step) for step in list(draws(8, 8, 20, seed=1)))
    again = list(draws(50, 8, 100, seed=3))
    assert all(np.array_equal(a, b) for a, b in zip(chosen, again, strict=True))
    assert len(next(iter(draws(5, 32, 1, seed=0)))) == 5


def test_the_block_loss_sums_over_channels_and_averages_over_the_rest():
    a, b = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
    by_hand = np.square(a.numpy() - b.numpy()).sum() / (3 * 5 * 5)
    np.testing.assert_allclose(float(block_loss(a, b, 1)), by_hand)
