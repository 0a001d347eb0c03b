"""Changes of images inside the loop: against torch's own operators image by image, piece by piece, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zsq_deploy.calib.parts.augment import Augment, Blur, Flip, Jitter, RandomResizedCrop, blurred, resampled
from zsq_deploy.calib.parts.augment import _multiplied as multiplied
from zsq_deploy.calib.parts.augment import _positions as positions

ALL = [
    Jitter(2),
    Jitter(0.25),
    Flip(0.5),
    Flip(0.5, each=True),
    RandomResizedCrop(),
    RandomResizedCrop(each=True),
    Blur(),
]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=random(seed))


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_pieces_are_changed_like_the_whole(augment: Augment) -> None:
    x, changed = images(7, 3, 8, 6), 0
    for seed in range(8):
        plan = augment.draw(tuple(x.shape), random(seed), 0, 1)
        whole = augment.apply(x, plan)
        parts = [augment.apply(x[a:b], {k: v[a:b] for k, v in plan.items()}) for a, b in ((0, 3), (3, 4), (4, 7))]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-12)
        again = augment.apply(x, augment.draw(tuple(x.shape), random(seed), 0, 1))
        assert torch.equal(whole, again)
        changed += not torch.equal(whole, x)
    assert changed >= 2  # of eight draws with a probability of one half or more


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_gradients_are_those_of_finite_differences(augment: Augment) -> None:
    x = images(2, 1, 5, 4).requires_grad_()
    for seed in range(4):
        plan = augment.draw(tuple(x.shape), random(seed), 0, 1)
        assert torch.autograd.gradcheck(lambda y, plan=plan: augment.apply(y, plan), x)


def test_jitter_and_flip_are_rolls_and_mirrors() -> None:
    x = images(3, 2, 8, 12)
    plan = Jitter(0.25).draw(tuple(x.shape), random(3), 0, 1)
    down, right = plan["shift"][0].tolist()
    assert torch.equal(Jitter(0.25).apply(x, plan), torch.roll(x, (down, right), (2, 3)))
    drawn = [Jitter(0.25).draw(tuple(x.shape), random(seed), 0, 1)["shift"][0].tolist() for seed in range(200)]
    assert {value for pair in drawn for value in pair} == {-2, -1, 0, 1, 2}  # a quarter of 8
    plan = Flip(0.5, each=True).draw(tuple(x.shape), random(5), 0, 1)
    made = Flip(0.5, each=True).apply(x, plan)
    for image, mirrored, result in zip(x, plan["mirror"], made, strict=True):
        assert torch.equal(result, torch.from_numpy(image.numpy()[..., ::-1].copy()) if mirrored else image)
    assert 0.4 < float(Flip(0.5, each=True).draw((1000, 1, 1, 1), random(), 0, 1)["mirror"].double().mean()) < 0.6
    assert len(set(Flip(0.5).draw((9, 1, 1, 1), random(), 0, 1)["mirror"].tolist())) == 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (1, 5)])
def test_crops_are_interpolated_boxes(height: int, width: int) -> None:
    x, augment = images(20, 2, height, width), RandomResizedCrop((0.2, 1.0), share=1.0)
    plan = augment.draw(tuple(x.shape), random(2), 0, 1)
    made = augment.apply(x, plan)
    for image, box, mirrored, result in zip(x, plan["box"], plan["mirror"], made, strict=True):
        top, left, tall, wide = box.tolist()
        assert top >= 0
        assert left >= 0
        assert top + tall <= height
        assert left + wide <= width
        cut = image[None, :, top : top + tall, left : left + wide]
        expected = F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result, expected.flip(2) if mirrored else expected, rtol=0, atol=1e-12)
    assert bool(plan["mirror"].any())
    assert not bool(plan["mirror"].all())


def test_the_whole_image_as_a_box_is_the_image() -> None:
    x = images(2, 3, 7, 10)
    box = torch.tensor([[0, 0, 7, 10]] * 2)
    torch.testing.assert_close(resampled(x, box), x, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(2, 9), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_matrix_products_sample_the_same(height: int, width: int, seed: int) -> None:
    """What is computed on GPUs, whose sampling has no deterministic gradient."""
    x = images(3, 2, height, width, seed=seed).requires_grad_()
    plan = RandomResizedCrop((0.1, 1.0)).draw(tuple(x.shape), random(seed), 0, 1)
    rows = positions(plan["box"][:, 0], plan["box"][:, 2], height, x.dtype)
    columns = positions(plan["box"][:, 1], plan["box"][:, 3], width, x.dtype)
    columns = torch.where(plan["mirror"][:, None], columns.flip(1), columns)
    a, b = multiplied(x, rows, columns), resampled(x, plan["box"], plan["mirror"])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    toward = images(*x.shape, seed=seed + 1)
    (to_a,), (to_b,) = (torch.autograd.grad((made * toward).sum(), x) for made in (a, b))
    torch.testing.assert_close(to_a, to_b, rtol=0, atol=1e-12)


def test_boxes_are_spread_as_they_should_be() -> None:
    """Area uniform, aspect ratio uniform in its logarithm (relative to the image's own), every place reached."""
    plan = RandomResizedCrop((0.3, 0.6), share=1.0).draw((4000, 3, 100, 200), random(), 0, 1)
    top, left, tall, wide = plan["box"].double().T
    area = tall * wide / 20000
    ratio = torch.log(wide / tall / 2)
    assert float(area.min()) > 0.29
    assert float(area.max()) < 0.61
    assert float(area.mean()) == pytest.approx(0.45, abs=0.005)
    assert float(ratio.abs().max()) < np.log(4 / 3) + 0.03
    assert float(ratio.mean()) == pytest.approx(0, abs=0.01)
    assert float(ratio.std()) == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), rel=0.05)
    assert int(top.min()) == int(left.min()) == 0
    assert bool((top + tall == 100).any())
    assert bool((left + wide == 200).any())


def test_share_is_of_steps_or_of_images() -> None:
    def drawn(augment: RandomResizedCrop, count: int) -> torch.Tensor:
        return torch.stack([augment.draw((6, 1, 8, 8), random(seed), 0, 1)["cropped"] for seed in range(count)])

    whole, each = drawn(RandomResizedCrop(share=0.3), 500), drawn(RandomResizedCrop(share=0.3, each=True), 100)
    assert bool((whole == whole[:, :1]).all())
    assert float(whole.double().mean()) == pytest.approx(0.3, abs=0.07)
    assert not bool((each == each[:, :1]).all())
    assert float(each.double().mean()) == pytest.approx(0.3, abs=0.07)
    x = images(6, 1, 8, 8)
    assert RandomResizedCrop(share=0.0).apply(x, RandomResizedCrop(share=0.0).draw((6, 1, 8, 8), random(), 0, 1)) is x


@pytest.mark.parametrize(
    "wrong", [{"scale": (0.0, 1.0)}, {"scale": (0.8, 0.5)}, {"scale": (0.5, 1.2)}, {"ratio": (2, 1)}]
)
def test_crops_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"share of the area|aspect ratios"):
        RandomResizedCrop(**wrong)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3])
def test_blur_against_a_plain_convolution(sigma: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    reach = int(np.ceil(3 * sigma))
    weight = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    expected = np.zeros_like(x)
    for i, a in enumerate(weight):
        for j, b in enumerate(weight):
            expected += a * b * padded[:, :, i : i + 7, j : j + 5]
    np.testing.assert_allclose(blurred(torch.from_numpy(x), sigma).numpy(), expected, atol=1e-12)
    flat = torch.full((1, 3, 4, 4), 2.5, dtype=torch.float64)
    torch.testing.assert_close(blurred(flat, sigma), flat)


def test_the_width_of_the_blur_is_drawn() -> None:
    drawn = [
        float(Blur((0.5, 2.0), share=0.5).draw((3, 1, 4, 4), random(seed), 0, 1)["sigma"][0]) for seed in range(300)
    ]
    blurring = [value for value in drawn if value]
    assert 0.4 < len(blurring) / 300 < 0.6
    assert 0.5 <= min(blurring) < 0.6
    assert 1.9 < max(blurring) <= 2.0
    x = images(3, 1, 4, 4)
    assert Blur(share=0.0).apply(x, Blur(share=0.0).draw((3, 1, 4, 4), random(), 0, 1)) is x
