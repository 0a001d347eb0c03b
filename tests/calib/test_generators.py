"""Conditional generators: against the plain formula in float64, their classes, exact states, and drawing from a trained one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zsq_deploy.calib.parts.generators import (
    ConditionalGenerator,
    DrawnImages,
    GeneratorForm,
    TrainedGenerator,
    keep_generator,
)
from zsq_deploy.calib.parts.labels import LabelSpace
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.recipe import Preparation

from .method_checks import random

LABELS = LabelSpace("out", 5, "matmul")


def start(count: int = 6, *, seed: int = 0, offset: int = 0, **more: object) -> Start:
    return Start((count, 3, 12, 10), random(seed), torch.device("cpu"), labels=LABELS, offset=offset, **more)


def plain(network: ConditionalGenerator, latents: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """GDFQ's generator operator by operator: interpolate, convolve, normalise."""

    def norm(x: torch.Tensor, number: int, eps: float) -> torch.Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        gain, shift = network.gains[number], network.shifts[number]
        rows = classes if len(gain) > 1 else torch.zeros_like(classes)
        return (x - mean) / (var + eps).sqrt() * gain[rows][:, :, None, None] + shift[rows][:, :, None, None]

    if network.embedding is not None:
        latents = latents * network.embedding[classes]
    x = (latents @ network.linear.weight.T + network.linear.bias).view(-1, *network.seed_shape)
    x = norm(x, 0, 1e-5)
    for number, conv in enumerate(network.convs):
        x = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
        x = F.leaky_relu(norm(x, number + 1, 0.8), 0.2)
    x = torch.tanh(F.conv2d(x, network.last.weight, network.last.bias, padding=1))
    x = x[:, :, : network.size[0], : network.size[1]]
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("conditioning", ["product", "norms"])
@pytest.mark.parametrize(("size", "upsamplings"), [((12, 10), 2), ((13, 18), 3), ((40, 7), 0)])
def test_it_is_the_plain_formula(conditioning: str, size: tuple[int, int], upsamplings: int) -> None:
    form = GeneratorForm(7, conditioning, wide=12, narrow=10, upsamplings=upsamplings)
    network = ConditionalGenerator(3, *size, 5, random(1), form).double()
    with torch.no_grad():  # so that classes differ
        for number, tensor in enumerate([*network.gains, *network.shifts]):
            tensor.add_(torch.randn(tensor.shape, generator=random(number), dtype=torch.float64), alpha=0.3)
    latents = torch.randn((6, 7), generator=random(2), dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 4, 2, 2, 1, 3])
    made, expected = network(latents, classes), plain(network, latents, classes)
    assert made.shape == (6, 3, *size)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(made.shape, generator=random(3), dtype=torch.float64)
    parameters = [latents, *network.parameters()]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), parameters) for x in (made, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_the_published_shape() -> None:
    """GDFQ on CIFAR: 100 latents, 128 channels on 8 x 8, convolutions 128-128, 128-64, 64-3."""
    network = ConditionalGenerator(3, 32, 32, 10, random())
    assert network.seed_shape == (128, 8, 8)
    assert [tuple(conv.weight.shape) for conv in network.convs] == [(128, 128, 3, 3), (64, 128, 3, 3)]
    assert network.last.weight.shape == (3, 64, 3, 3)
    assert network.embedding is not None
    assert network.embedding.shape == (10, 100)
    large = ConditionalGenerator(3, 224, 224, 2, random(), GeneratorForm(upsamplings=0))
    assert large.seed_shape == (128, 14, 14)
    with pytest.raises(ValueError, match="cannot be built"):
        GeneratorForm(latent=0)


@pytest.mark.parametrize("conditioning", ["product", "norms"])
def test_classes_make_a_difference(conditioning: str) -> None:
    network = ConditionalGenerator(3, 12, 10, 5, random(1), GeneratorForm(16, conditioning))
    if conditioning == "norms":
        with torch.no_grad():
            network.gains[1][3] *= 2
    latents = torch.randn((4, 16), generator=random(2))
    a, b = (network(latents, torch.tensor([0, 1, 2, last])).detach() for last in (0, 3))
    assert float((a[3] - b[3]).abs().mean()) > 0.02


def test_every_step_sees_new_latents_and_an_exact_state_goes_on() -> None:
    trained = TrainedGenerator(start(), GeneratorForm(16))
    assert list(trained.groups()) == ["generator"]
    first = trained.images()
    assert torch.equal(first, trained.images())  # nothing is drawn by looking
    trained.renew()
    second, classes = trained.images(), trained.targets.classes
    assert not torch.allclose(first, second)
    assert set(classes.tolist()) <= set(range(5))
    state = {name: value.clone() for name, value in trained.state().items()}
    trained.renew()
    third = trained.images()
    other = TrainedGenerator(start(seed=9), GeneratorForm(16))
    other.load(state)
    other.renew()
    assert torch.equal(other.images(), third)
    assert torch.equal(other.targets.classes, trained.targets.classes)


def test_drawing_uses_the_trained_weights_and_all_classes() -> None:
    trained = TrainedGenerator(start(), GeneratorForm(16))
    with torch.no_grad():
        trained.network.last.weight.mul_(-1.5)
    kept = {f"parameters.{name}": value for name, value in trained.state().items()}
    prepared = keep_generator(Preparation(None, 12, 6, [kept]))  # type: ignore[arg-type]
    assert set(prepared) == {name for name in trained.state() if name != "random"}
    drawn = DrawnImages(start(7, seed=4, offset=3, prepared=prepared), GeneratorForm(16))
    assert drawn.groups() == {}
    assert drawn.targets.classes.tolist() == [3, 4, 0, 1, 2, 3, 4]
    expected = trained.network(drawn.latents, drawn.targets.classes)
    torch.testing.assert_close(drawn.images(), expected)
    again = DrawnImages(start(7, seed=5, prepared=prepared), GeneratorForm(16))
    assert not torch.equal(again.images(), drawn.images())
    again.load(drawn.state())
    assert torch.equal(again.latents, drawn.latents)
