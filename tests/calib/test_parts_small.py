"""Schedules against torch's, swing against padding and cutting, the input space, seeds, the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zsq_deploy.calib.parts.parametrisations import ImageGenerator, LatentImages, Pixels, upsampled_conv
from zsq_deploy.calib.parts.priors import NATURAL_MEAN, NATURAL_STD, InputSpace, total_variation
from zsq_deploy.calib.parts.recipe import resolve
from zsq_deploy.calib.parts.schedules import EarlyStop, Exponential, Plateau, ScheduleState
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.swing import shift, swing_taps
from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import TensorSpec


class Bounds:
    """Preprocessing as far as the input space needs it."""

    def __init__(self, low: list[float], high: list[float]) -> None:
        self.low, self.high = np.array(low, np.float32), np.array(high, np.float32)

    def bounds(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        assert channels == len(self.low)
        return self.low, self.high

    def apply(self, images_u8_nhwc: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def image(channels: int = 3) -> TensorSpec:
    return TensorSpec("image", (None, channels, 8, 12), np.dtype(np.float32))


@settings(max_examples=30, deadline=None)
@given(losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=60), patience=st.integers(0, 6))
def test_plateau_is_torchs(losses: list[float], patience: int) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([parameter], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=patience, min_lr=1e-4, factor=0.1)
    mine, state = Plateau(patience, 0.1, 1e-4), ScheduleState()
    for step, loss in enumerate(losses, 1):
        theirs.step(loss)
        rate = mine.after(step, loss, 0.5, state)
        assert rate == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6)
        state = ScheduleState.unpack(state.pack())


def test_exponential() -> None:
    schedule, state = Exponential(0.95, 100), ScheduleState()
    assert schedule.after(99, 1.0, 0.01, state) == 0.01
    assert schedule.after(250, 1.0, 0.01, state) == pytest.approx(0.01 * 0.95**2)


def test_early_stop_waits_for_the_smoothed_loss() -> None:
    rule, state = EarlyStop(patience=5, threshold=0.01, weight=0.5), ScheduleState()
    assert not any(rule.done(100 * 0.9**step, state) for step in range(50))
    answers = [rule.done(100 * 0.9**50, state) for _ in range(30)]
    assert answers.index(True) in range(5, 20)


@settings(max_examples=40, deadline=None)
@given(down=st.integers(-2, 2), right=st.integers(-2, 2), height=st.integers(3, 7), width=st.integers(3, 7))
def test_shift_is_reflection_padding_and_a_cut(down: int, right: int, height: int, width: int) -> None:
    x = torch.arange(2 * 3 * height * width, dtype=torch.float64).reshape(2, 3, height, width).requires_grad_()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    expected = padded[:, :, 2 - down : 2 - down + height, 2 - right : 2 - right + width]
    moved = shift(x, down, right)
    assert torch.equal(moved, expected)
    weight = torch.randn(moved.shape, dtype=torch.float64)
    (a,) = torch.autograd.grad((moved * weight).sum(), x)
    (b,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(a, b)


def test_shift_of_one_pixel_maps_stays() -> None:
    x = torch.randn(1, 2, 1, 5)
    assert torch.equal(shift(x, 1, 0), x)


def test_swing_draws_every_shift_and_only_from_its_generator() -> None:
    x, seen = torch.arange(25.0).reshape(1, 1, 5, 5), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        taps = swing_taps(["a", "b"], generator, 1)
        seen.add(float(taps["a"](x)[0, 0, 2, 2]))
    assert seen == {float(x[0, 0, i, j]) for i in (1, 2, 3) for j in (1, 2, 3)}
    assert swing_taps([], generator) == {}


def test_input_space_of_the_usual_normalisation_is_the_identity() -> None:
    mean, std = np.array(NATURAL_MEAN), np.array(NATURAL_STD)
    space = InputSpace.of(image(), Bounds(list((0 - mean) / std), list((1 - mean) / std)))
    x = torch.randn(2, 3, 8, 12) * 3
    assert space.to_network(x) is x
    clipped = space.clip(x)
    low, high = torch.as_tensor((0 - mean) / std).float(), torch.as_tensor((1 - mean) / std).float()
    torch.testing.assert_close(clipped, torch.minimum(torch.maximum(x, low.view(1, 3, 1, 1)), high.view(1, 3, 1, 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_input_space_of_raw_pixels(channels: int) -> None:
    space = InputSpace.of(image(channels), Bounds([0.0] * channels, [255.0] * channels))
    network = space.to_network(torch.zeros(1, channels, 8, 12))
    expected = np.array(NATURAL_MEAN) * 255 if channels == 3 else np.array([np.mean(NATURAL_MEAN) * 255])
    np.testing.assert_allclose(network[0, :, 0, 0].numpy(), expected, rtol=1e-6)
    valid = space.bounded(space.to_network(torch.randn(4, channels, 8, 12) * 9))
    assert float(valid.min()) == 0.0
    assert float(valid.max()) == 255.0


def test_inputs_that_are_no_images_are_left_alone() -> None:
    spec = TensorSpec("x", (None, 7), np.dtype(np.float32))
    space = InputSpace.of(spec, Bounds([], []))
    x = torch.randn(3, 7) * 100
    assert space.clip(x) is x
    assert space.bounded(x) is x


def test_total_variation_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 6))
    parts = [x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]]
    parts += [x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]]
    tensor = torch.from_numpy(x)
    assert float(total_variation(tensor)) == pytest.approx(sum(np.linalg.norm(part) for part in parts))
    assert float(total_variation(tensor, "l1")) == pytest.approx(sum(np.abs(part).mean() for part in parts))


def test_every_batch_and_purpose_has_its_own_numbers() -> None:
    keys = [(0, "images", 0), (0, "images", 1), (0, "swing", 0), (1, "images", 0)]
    drawn = [tuple(torch.randn(4, generator=batch_generator(*key)).tolist()) for key in keys]
    assert len(set(drawn)) == 4
    assert drawn[0] == tuple(torch.randn(4, generator=batch_generator(0, "images", 0)).tolist())


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 10, 7), (3, 5, 18)])
@pytest.mark.parametrize("upsamplings", [1, 2, 3])
def test_generator_makes_standardised_images_of_any_size(
    channels: int, height: int, width: int, upsamplings: int
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    network = ImageGenerator(
        channels, height, width, torch.Generator().manual_seed(3), latent=16, wide=8, narrow=6, upsamplings=upsamplings
    )
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is nobody's business
    made = network(torch.randn(9, 16))
    assert made.shape == (9, channels, height, width)
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std((0, 2, 3), correction=0), torch.ones(channels), atol=0.02, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (1, 3), (5, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampled_convolution_is_the_convolution_of_the_upsampled(
    height: int, width: int, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, height, width, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(5, 6, 3, 3, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    got = upsampled_conv(x, weight, bias)
    torch.testing.assert_close(got, expected)
    toward = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((got * toward).sum(), inputs),
        torch.autograd.grad((expected * toward).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_open_number_of_upsamplings_keeps_the_seed_small() -> None:
    small, large = (
        ImageGenerator(3, side, side, torch.Generator().manual_seed(3), latent=4, upsamplings=0) for side in (32, 224)
    )
    assert small.seed_shape == (128, 8, 8)
    assert large.seed_shape == (128, 14, 14)
    assert [conv.out_channels for conv in large.convs] == [64, 32, 16, 3]
    assert large(torch.randn(2, 4)).shape == (2, 3, 224, 224)


def test_generator_starts_like_torchs_layers() -> None:
    network = ImageGenerator(3, 8, 8, torch.Generator().manual_seed(3), latent=64)
    for layer in (network.linear, *network.convs):
        bound = 1 / np.sqrt(layer.weight[0].numel())
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
        assert float(layer.bias.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_parametrisation_goes_back_to_its_state(kind: str) -> None:
    def make(seed: int) -> Pixels | LatentImages:
        generator = torch.Generator().manual_seed(seed)
        return Pixels((2, 3, 8, 8), generator) if kind == "pixels" else LatentImages((2, 3, 8, 8), generator, latent=5)

    one, other = make(1), make(2)
    assert not torch.equal(one.images(), other.images())
    other.load(one.state())
    assert torch.equal(one.images(), other.images())


def test_unknown_or_wrong_parameters_are_named() -> None:
    assert resolve("m", {"steps": 5, "rate": 0.5}, {"rate": 1}) == {"steps": 5, "rate": 1.0}
    with pytest.raises(UsageError, match="no parameter 'stepz'"):
        resolve("m", {"steps": 5}, {"stepz": 3})
    for wrong in ("9", 2.5, True):
        with pytest.raises(UsageError, match="has to be int"):
            resolve("m", {"steps": 5}, {"steps": wrong})
