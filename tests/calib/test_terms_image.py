"""Terms on the images alone, against plain numpy in float64, in pieces, and their gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.terms import GramSpectrum, LikeBlurred, Look, PixelNorm, TotalVariation

CONTEXT: Any = SimpleNamespace(seed=4)
COUNT = 5


def look(images: torch.Tensor, seen: torch.Tensor | None = None, first: int = 0, batch: int = COUNT) -> Look:
    return Look(
        images=images,
        seen=images if seen is None else seen,
        values={},
        observed={},
        targets=None,
        number=0,
        steps=1,
        batch=batch,
        first=first,
        memory={},
    )


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or (COUNT, 2, 6, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(np.ceil(3 * sigma))
    weight = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    for axis in (2, 3):
        edges = [(0, 0)] * 4
        edges[axis] = (reach, reach)
        padded = np.pad(x, edges, mode="edge")
        x = sum(w * np.take(padded, range(i, i + x.shape[axis]), axis) for i, w in enumerate(weight))
    return x


def reference(term: Any, x: np.ndarray) -> float:
    if isinstance(term, LikeBlurred):
        return float(np.mean((x - blurred(x, term.sigma)) ** 2))
    if isinstance(term, PixelNorm):
        norms = np.sqrt((x**2).sum((1, 2, 3)))
        return {"batch": float(np.sqrt((x**2).sum())), "image": norms.mean(), "square": (norms**2).mean()}[term.of]
    if isinstance(term, GramSpectrum):

        def spectrum(y: np.ndarray) -> np.ndarray:
            rows = y.reshape(len(y), -1)
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            return np.sort(np.linalg.svd(rows, compute_uv=False)[: len(y)] ** 2)

        random = batch_generator(CONTEXT.seed, "spectrum", 0)
        noise = np.mean([spectrum(torch.randn(x.shape, generator=random).numpy()) for _ in range(4)], 0)
        return float(np.mean((spectrum(x) - noise) ** 2))
    steps = [x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]]
    steps += [x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]]
    return sum(np.abs(d).mean() if term.norm == "l1" else np.linalg.norm(d) for d in steps)


TERMS = [
    TotalVariation(),
    TotalVariation(norm="l1"),
    PixelNorm(),
    PixelNorm(of="image"),
    PixelNorm(of="square"),
    LikeBlurred(sigma=0.8),
    GramSpectrum(),
]


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_against_numpy_in_pieces_and_with_gradients(term: Any) -> None:
    x = pictures().requires_grad_()
    bound = term.bind(CONTEXT)
    assert tuple(bound.fetch) == ()
    assert float(bound(look(x))) == pytest.approx(reference(term, x.detach().numpy()), rel=1e-5)
    if term.separable:
        parts = [bound(look(x[a:b], first=a)) for a, b in ((0, 1), (1, 5))]
        assert float(sum(parts)) == pytest.approx(float(bound(look(x))), rel=1e-12)
    assert torch.autograd.gradcheck(lambda y: bound(look(y)), x)


def test_which_images_are_looked_at() -> None:
    """What the network was given for sizes and variation, the images themselves for the rest."""
    x, other = pictures(), pictures(seed=1)
    for term in TERMS:
        bound = term.bind(CONTEXT)
        of_seen = isinstance(term, (PixelNorm, TotalVariation))
        assert float(bound(look(x, other))) == float(bound(look(other if of_seen else x)))
    assert float(TotalVariation(seen=False)(look(x, other))) == float(TotalVariation()(look(x)))


def test_equal_images_are_far_from_noise() -> None:
    bound = GramSpectrum().bind(CONTEXT)
    alike = pictures(1, 3, 16, 16).expand(COUNT, -1, -1, -1)
    noise = pictures(COUNT, 3, 16, 16, seed=9)
    assert float(bound(look(noise))) < 0.01 < 1 < float(bound(look(alike)))
    x = (0.8 * alike + 0.2 * noise).contiguous().requires_grad_()
    before = bound(look(x))
    (slope,) = torch.autograd.grad(before, x)
    assert float(bound(look(x.detach() - 0.1 * slope / slope.norm()))) < float(before)


def test_smooth_images_are_like_their_blur() -> None:
    bound = LikeBlurred().bind(CONTEXT)
    flat = torch.ones(COUNT, 3, 8, 8, dtype=torch.float64)
    assert float(bound(look(flat))) == pytest.approx(0, abs=1e-20)
    checks = flat.clone()
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = -1
    assert float(bound(look(checks))) > 0.5
    assert float(bound(look(torch.randn(COUNT, 7)))) == 0  # no image, no neighbours


def test_a_black_image_has_a_gradient() -> None:
    x = torch.zeros(COUNT, 2, 4, 4).requires_grad_()
    for term in (PixelNorm(), PixelNorm(of="image"), LikeBlurred()):
        (slope,) = torch.autograd.grad(term.bind(CONTEXT)(look(x)), x)
        assert bool(torch.isfinite(slope).all())
