"""Soft weights updated in one pass, against the same written with torch in float64 and torch's own Adam."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from zsq_deploy.quant.reconstruct import Preset, native
from zsq_deploy.quant.reconstruct.fused import FusedRounding
from zsq_deploy.quant.reconstruct.quantizers import initial_logits

from .test_reconstruct_learn import watch_blocks

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="there is no C compiler")


def setting(shape, rows, seed=0):
    """Weight, scale, integer part and logits; every weight lies well inside its cell."""
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy(rng.uniform(0.1, 0.4, (shape[0] if rows else 1, *[1] * (len(shape) - 1)))).float()
    codes = torch.from_numpy(rng.integers(-6, 6, shape) + rng.uniform(0.05, 0.95, shape)).float()
    w = codes * scale
    if w.dim() == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    return scale, *initial_logits(w, scale)


def torch_steps(v, scale, base, gradients, strength, beta, rate):
    """Float64, the formulas as the papers write them, torch's gradients and Adam."""
    v, scale, base = v.double().clone().requires_grad_(), scale.double().clone().requires_grad_(), base.double()
    adam = torch.optim.Adam([v], lr=rate)
    weights, slopes = [], []
    for g in gradients:
        h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0.0, 1.0)
        w = torch.clamp(base + h, -4, 3) * scale
        loss = (w * g.double()).sum() + strength * (1.0 - (2.0 * h - 1.0).abs() ** beta).sum()
        adam.zero_grad()
        scale.grad = None
        loss.backward()
        weights.append(w.detach())
        slopes.append(scale.grad.clone())
        adam.step()
    return weights, slopes, v.detach()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (40, 33), (7, 1, 3, 3), (64, 600)])
@pytest.mark.parametrize(("strength", "beta"), [(0.0, 2.0), (0.3, 2.0), (0.02, 19.5)])
def test_weights_gradients_and_updates_are_those_of_torch(shape, rows, strength, beta):
    scale, base, logits = setting(shape, rows)
    rng = np.random.default_rng(1)
    gradients = [torch.from_numpy(rng.normal(size=shape)).float() for _ in range(5)]
    weights, slopes, end = torch_steps(logits, scale, base, gradients, strength, beta, 0.03)
    leaf, factor = logits.clone().requires_grad_(), scale.clone().requires_grad_()
    fused = FusedRounding.of(leaf, base, factor, -4, 3)
    fused.rate = 0.03
    for g, weight, slope in zip(gradients, weights, slopes, strict=True):
        found = fused.weight(leaf, factor, strength, beta)
        torch.testing.assert_close(found.double(), weight, rtol=1e-5, atol=1e-5)
        assert found.stride() == logits.stride()
        factor.grad = None
        found.backward(g)
        torch.testing.assert_close(factor.grad.double(), slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()))
        assert leaf.grad is None
    torch.testing.assert_close(leaf.detach().double(), end, rtol=1e-4, atol=1e-4)
    assert (leaf - logits).abs().max() > 0.05


def test_extreme_logits_do_no_harm():
    base = torch.zeros(1, 8)
    leaf = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 1e-30]]).requires_grad_()
    scale = torch.ones(1, 1, requires_grad=True)
    fused = FusedRounding.of(leaf, base, scale, -8, 7)
    fused.rate = 0.1
    found = fused.weight(leaf, scale, 1.0, 20.0)
    torch.testing.assert_close(found.detach(), torch.tensor([[0, 0, 0, 0.5, 1, 1, 1, 0.5]]), rtol=0, atol=1e-6)
    found.backward(torch.ones(1, 8))
    assert torch.isfinite(leaf).all()
    assert (leaf.detach()[0, [0, 1, 2, 4, 5, 6]] == torch.tensor([-1e4, -90, -20, 20, 90, 1e4])).all()
    assert (leaf.detach()[0, [3, 7]] < 0).all()


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scale, base, logits = setting((200, 900), True)
            leaf = logits.clone().requires_grad_()
            fused = FusedRounding.of(leaf, base, scale.requires_grad_(), -8, 7)
            fused.rate = 0.01
            for number in range(3):
                found = fused.weight(leaf, scale, 0.1, 5.0)
                scale.grad = None
                found.backward(torch.from_numpy(np.random.default_rng(number).normal(size=(200, 900))).float())
            ends.append((found.detach(), leaf.detach(), scale.grad))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_what_the_loops_cannot_take_is_left_to_torch():
    scale, base, logits = setting((6, 5), True)
    assert FusedRounding.of(logits, base, scale, -8, 7) is not None
    assert FusedRounding.of(logits, base, torch.ones(1, 5), -8, 7) is None  # scales along the other axis
    assert FusedRounding.of(logits, base, scale, torch.zeros(6, 1), torch.ones(6, 1)) is None  # limits row by row
    assert FusedRounding.of(logits.double(), base.double(), scale, -8, 7) is None
    assert FusedRounding.of(logits, base.T.contiguous().T, scale, -8, 7) is None
    assert FusedRounding.of(logits.T, base.T, torch.ones(5, 1), -8, 7) is None


@pytest.mark.parametrize("relative", [True, False])
def test_blocks_learn_what_they_learn_with_torch(monkeypatch, relative):
    """Some steps of every block, with and without the loops."""

    def learned():
        found = []

        def look(learner, cache, count, task):
            stepper = learner.stepper(cache)
            with_loops = bool(learner.fused())
            for step in range(6):
                stepper.step(np.arange(8), step, strength=0.02 * (step > 2), beta=6.0, falling=1.0)
            found.extend(
                (with_loops, item.logits.detach().clone(), item.factor.detach().clone()) for item in learner.layers
            )
            return 0.0

        preset = Preset("some", steps=10, batch=8, rounding_lr=0.02, weight_scale_lr=1e-3, relative=relative)
        watch_blocks(look, dataclasses.replace(preset, drop=0.5))
        return found

    fast = learned()
    monkeypatch.setattr("zsq_deploy.quant.reconstruct.fused.kernels", lambda: None)
    slow = learned()
    assert {used for used, *_ in fast} == {True}
    assert {used for used, *_ in slow} == {False}
    for (_, a, b), (_, c, d) in zip(fast, slow, strict=True):
        # On an edge of the sigmoid (a weight that is a whole number of steps, one in every channel) the last bit decides between the gradients of its
        # two sides.
        assert ((a - c).abs() < 1e-3).float().mean() > 0.93
        torch.testing.assert_close(b, d, rtol=2e-3, atol=1e-6)
