"""The statistics loss in all published forms against plain numpy in float64, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.bn_loss import BNLayer, BNLoss, BNMatcher, Observed
from zsq_deploy.calib.parts.moments import watch

FORMS = {
    "B1a": BNLoss(
        per_sample=True, moment="std", unbiased=True, norm="l2sq", divide_by="channels", eps=1e-6, input_prior=True
    ),
    "B1a per image": BNLoss(per_sample=True, moment="std", unbiased=True, norm="l2sq", divide_by="batch", eps=1e-6),
    "B1b": BNLoss(moment="var", norm="mse", reduce="mean"),
    "B1c": BNLoss(moment="var", norm="l2", layer_weight="first_x10"),
    "B1d": BNLoss(moment="std", unbiased=True, norm="l2sq", divide_by="channels", eps=1e-6, input_prior=True),
    "B1e": BNLoss(norm="kl", reduce="mean"),
    "B1f": BNLoss(
        per_sample=True, moment="std", unbiased=True, norm="hinge", divide_by="batch", eps=1e-6, emphasis=True
    ),
    "B1g": BNLoss(moment="var", norm="mse", reduce="mean", layer_weight="shallow_0.2_deep_1.1"),
    "B1c in units of the layer": BNLoss(moment="var", norm="l2", layer_weight="first_x10", relative=True),
    "B1a in units of the layer": BNLoss(
        per_sample=True, moment="std", unbiased=True, norm="l2sq", divide_by="channels", eps=1e-6, relative=True
    ),
    "plain": BNLoss(per_sample=True, moment="var", norm="l2sq", divide_by="none"),
}


def network_maps(seed: int, batch: int = 5, dtype: type = np.float64) -> tuple[list[np.ndarray], list[BNLayer]]:
    """Maps as three layers would see them, and layers with other statistics."""
    random = np.random.default_rng(seed)
    shapes = [(batch, 4, 6, 5), (batch, 7, 3, 3), (batch, 2, 4, 4)]
    maps, layers = [], []
    for number, shape in enumerate(shapes):
        channels = shape[1]
        maps.append((random.normal(size=shape) * random.uniform(0.5, 2, (1, channels, 1, 1)) + 0.3).astype(dtype))
        layers.append(
            BNLayer(
                f"bn{number}",
                f"v{number}",
                random.normal(size=channels),
                random.uniform(0.2, 3, channels),
                1e-3,
            )
        )
    return maps, layers


def reference(
    loss: BNLoss, maps: list[np.ndarray], layers: list[BNLayer], images: np.ndarray, slack: list | None
) -> float:
    """The same written down once more, layer by layer, as the papers state it."""
    total, count, batch = 0.0, len(layers), maps[0].shape[0]
    for index, (y, layer) in enumerate(zip(maps, layers, strict=True)):
        z = y
        axes = (2, 3) if loss.per_sample else (0, 2, 3)
        mean, var = z.mean(axes), z.var(axes, ddof=int(loss.unbiased))
        eps_stored = layer.eps if loss.eps is None else loss.eps
        eps_seen = 1e-12 if loss.eps is None else loss.eps
        weight = {
            "one": 1.0,
            "first_x10": 10.0 if index == 0 else 1.0,
            "shallow_0.2_deep_1.1": 0.2 if index < count // 2 else 1.1,
        }[loss.layer_weight]
        if loss.norm == "kl":
            stored, seen = layer.var + eps_stored, var + eps_stored
            value = np.mean(0.5 * (np.log(stored / seen) + (seen + (mean - layer.mean) ** 2) / stored - 1))
        else:
            if loss.moment == "std":
                gaps = [mean - layer.mean, np.sqrt(var + eps_seen) - np.sqrt(layer.var + eps_stored)]
            else:
                gaps = [mean - layer.mean, var - layer.var]
            if loss.relative:
                level = layer.var.mean()
                gaps = [gaps[0] / level**0.5, gaps[1] / (level**0.5 if loss.moment == "std" else level)]
            if loss.norm == "hinge":
                gaps = [np.maximum(np.abs(gap) - limit, 0) for gap, limit in zip(gaps, slack[index], strict=True)]
            factor = np.ones(batch if loss.per_sample else 1)
            if loss.emphasis:
                factor = np.array([2.0 if sample % count == index else 1.0 for sample in range(batch)])
            if loss.norm == "mse":
                value = sum(np.mean(gap**2) for gap in gaps)
            elif loss.norm == "l2":
                value = sum(np.linalg.norm(gap) for gap in gaps)
            else:
                squares = [gap**2 if gap.ndim == 2 else gap[None] ** 2 for gap in gaps]
                divisor = {"none": 1, "batch": batch if loss.per_sample else 1, "channels": z.shape[1]}[loss.divide_by]
                value = sum((factor[:, None] * square).sum() for square in squares) / divisor
        total += weight * value
    if loss.reduce == "mean":
        total /= count
    if loss.input_prior:
        mean, std = images.mean((2, 3)), np.sqrt(images.var((2, 3), ddof=int(loss.unbiased)) + 1e-6)
        prior = (mean**2).sum() + ((std - 1) ** 2).sum()
        total += prior / batch if loss.per_sample else prior
    return float(total)


def evaluate(
    loss: BNLoss,
    maps: list[torch.Tensor],
    layers: list[BNLayer],
    images: torch.Tensor,
    noise: list[list[torch.Tensor]] | None = None,
    **options: int,
) -> torch.Tensor:
    matcher = BNMatcher(loss, layers, dtype=maps[0].dtype)

    def look(values: list[torch.Tensor]) -> Mapping[str, Observed]:
        store: dict[str, Observed] = {}
        taps = matcher.taps(store)
        for number, value in enumerate(values):
            taps[f"v{number}"](value)
        return store

    if noise is not None:
        matcher.set_slack([look(values) for values in noise])
    _, mean, var = watch(images, per_sample=True, unbiased=loss.unbiased)
    prior = BNLayer("input", "input", np.zeros(3), np.ones(3), 0.0)
    return matcher(
        look(maps),
        batch=options.get("batch", len(images)),
        first=options.get("first", 0),
        inputs=Observed(mean, var),
        input_layer=prior,
    ).total


def slack_of(loss: BNLoss, noise: list[list[np.ndarray]], layers: list[BNLayer]) -> list[tuple[float, float]]:
    found = []
    for index, layer in enumerate(layers):
        means, seconds = [], []
        for maps in noise:
            z = maps[index]
            means.append(np.abs(z.mean((2, 3)) - layer.mean).ravel())
            deviation = np.sqrt(z.var((2, 3), ddof=1) + loss.eps) - np.sqrt(layer.var + loss.eps)
            seconds.append(np.abs(deviation).ravel())
        found.append((np.quantile(np.concatenate(means), 0.9), np.quantile(np.concatenate(seconds), 0.9)))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_value_against_numpy(form: str) -> None:
    loss = FORMS[form]
    maps, layers = network_maps(1)
    images = np.random.default_rng(2).normal(0.2, 1.4, (5, 3, 8, 6))
    noise = (
        [[value * 1.1 + 0.05 for value in network_maps(seed)[0]] for seed in (5, 6)] if loss.norm == "hinge" else None
    )
    slack = slack_of(loss, noise, layers) if noise else None
    got = evaluate(
        loss,
        [torch.from_numpy(value) for value in maps],
        layers,
        torch.from_numpy(images),
        [[torch.from_numpy(value) for value in values] for values in noise] if noise else None,
    )
    assert float(got) == pytest.approx(reference(loss, maps, layers, images, slack), rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_against_finite_differences(form: str) -> None:
    loss = FORMS[form]
    maps, layers = network_maps(3, batch=3)
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = None
    if loss.norm == "hinge":
        noise = [[torch.from_numpy(value) * 0.4 + 0.3 for value in network_maps(8, 3)[0]]]
    inputs = [torch.from_numpy(value).requires_grad_() for value in maps]

    def total(pictures: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return evaluate(loss, list(values), layers, pictures, noise)

    assert torch.autograd.gradcheck(total, (images.requires_grad_(), *inputs), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", [name for name, loss in FORMS.items() if loss.separable and loss.norm != "hinge"])
@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 4), seed=st.integers(0, 99))
def test_pieces_add_up_to_the_batch(form: str, cut: int, seed: int) -> None:
    loss = FORMS[form]
    maps, layers = network_maps(seed)
    values = [torch.from_numpy(value) for value in maps]
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    whole = evaluate(loss, values, layers, images)
    parts = [
        evaluate(loss, [v[a:b] for v in values], layers, images[a:b], batch=5, first=a) for a, b in ((0, cut), (cut, 5))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-10)


def test_a_map_of_one_pixel_is_matched_over_the_batch() -> None:
    layer = BNLayer("bn", "v0", np.zeros(3), np.ones(3), 1e-5)
    loss = BNLoss(per_sample=True, moment="std", unbiased=True, norm="l2sq", divide_by="channels", eps=1e-6)
    values = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    matcher, store = BNMatcher(loss, [layer], dtype=torch.float64), dict[str, Observed]()
    matcher.taps(store)["v0"](values)
    z = values.numpy()[:, :, 0, 0]
    gap = (z.mean(0) ** 2).sum() + ((np.sqrt(z.var(0, ddof=1) + 1e-6) - np.sqrt(1 + 1e-6)) ** 2).sum()
    assert float(matcher(store, batch=6).total) == pytest.approx(6 * gap / 3)


def test_conv_out_leaves_out_what_has_no_convolution_in_front() -> None:
    layers = [
        BNLayer("a", "v0", np.zeros(1), np.ones(1), 0.0),
        BNLayer("b", "v1", np.zeros(1), np.ones(1), 0.0, direct=False),
    ]
    assert [layer.name for layer in BNMatcher(BNLoss(hook="conv_out"), layers).layers] == ["a"]
    assert [layer.name for layer in BNMatcher(BNLoss(), layers).layers] == ["a", "b"]
    with pytest.raises(ValueError, match="no batch-norm layer"):
        BNMatcher(BNLoss(hook="conv_out"), layers[1:])


@pytest.mark.parametrize("options", [{"layer_weight": "deep"}, {"emphasis": True}, {"slack_quantile": 1.5}])
def test_choices_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        BNLoss(**options)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bounds", [None, (0.0, np.inf), (-0.5, 1.0)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (4, 16, 8, 8), (1, 70, 5, 5)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_watch_against_autograd(
    compiled: bool,
    bounds: tuple | None,
    per_sample: bool,
    shape: tuple,
    own: bool,
    joined: bool,
    normed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both implementations, in float32, against torch's own differentiation of the plain formula in float64."""
    if compiled:
        if native.kernels() is None:
            pytest.skip("no C compiler here")
    else:
        monkeypatch.setattr(native, "kernels", lambda: None)
    generator = torch.Generator().manual_seed(shape[1])
    y = torch.randn(shape, generator=generator) * 1.5 + 2 * torch.randn((1, shape[1], 1, 1), generator=generator)
    weight = torch.randn(shape, generator=generator)
    axes = (2, 3) if per_sample else (0, 2, 3)
    exact = y.double().requires_grad_()
    more = torch.randn(shape, generator=generator) if joined else torch.zeros(shape)
    exact_more = more.double().requires_grad_()
    affine = None
    total = exact + exact_more
    if normed:
        affine = (torch.randn(shape[1], generator=generator), torch.randn(shape[1], generator=generator))
        scale, shift = (part.double().view(1, -1, 1, 1) for part in affine)
        total = exact * scale + shift + exact_more
    passed = total if bounds is None else total.clamp(*bounds)
    mean, var = exact.mean(axes), exact.var(axes, correction=1)
    toward = torch.randn(mean.shape, generator=generator)
    (passed.mul(weight.double()).sum() + (mean * toward).sum() * 40 + (var * toward).sum() * 30).backward()

    mine = y.contiguous(memory_format=torch.channels_last).requires_grad_()
    mine_more = more.contiguous(memory_format=torch.channels_last).requires_grad_()
    out, m, v = watch(
        mine * 1,
        per_sample=per_sample,
        unbiased=True,
        affine=affine,
        bounds=bounds,
        addend=mine_more * 1 if joined else None,
        own_gradient=own,
    )
    torch.testing.assert_close(out, passed.float(), rtol=0, atol=1e-5 if normed else 0)
    torch.testing.assert_close(m.double(), mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(v.double(), var, rtol=2e-5, atol=1e-6)
    ((out * weight).sum() + (m * toward).sum() * 40 + (v * toward).sum() * 30).backward()
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=2e-5)
    if joined:
        torch.testing.assert_close(mine_more.grad.double(), exact_more.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_watch_keeps_a_spread_that_drowns_in_a_mean(
    compiled: bool, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of squares about zero lose a spread of 1 about a mean of 1000 in float32."""
    if not compiled:
        monkeypatch.setattr(native, "kernels", lambda: None)
    y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) + 1000
    y = y.contiguous(memory_format=torch.channels_last)
    _, mean, var = watch(y, per_sample=per_sample, unbiased=False)
    axes = (2, 3) if per_sample else (0, 2, 3)
    torch.testing.assert_close(mean.double(), y.double().mean(axes), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), y.double().var(axes, correction=0), rtol=1e-4, atol=0)


def test_the_gradient_of_others_is_not_changed() -> None:
    """An Add sends one tensor to both inputs; a watch that does not own its gradient has to leave it as it is."""
    y = torch.randn(2, 3, 4, 4).requires_grad_()
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    out, mean, _ = watch(y * 1, per_sample=True, unbiased=False)
    ((out + x).sum() + mean.sum()).backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(y.grad, torch.full_like(y, 1 + 1 / 16))
