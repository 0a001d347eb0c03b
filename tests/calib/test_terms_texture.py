"""Laws' texture energies and their shares: against loops in float64, hinges by hand, gradients, pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.terms.base import Look
from zsq_deploy.calib.parts.terms.texture import TEXTURES, TextureShares, texture_energies

from .method_checks import random

MASKS = {"L": [1, 4, 6, 4, 1], "E": [-1, -2, 0, 2, 1], "S": [-1, 0, 2, 0, -1], "R": [1, -4, 6, -4, 1]}


def look(images: torch.Tensor, batch: int | None = None) -> Look:
    return Look(images, images, {}, {}, None, 0, 1, batch or len(images), 0, {})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=random(seed), dtype=torch.float64)


def test_energies_are_those_of_a_loop() -> None:
    images = noise(3, 2, 9, 7)
    assert len(TEXTURES) == 9
    expected = np.zeros((3, 9))
    gray = images.mean(1).numpy()
    for n in range(3):
        for k, (a, b) in enumerate(TEXTURES):
            found = []
            for first, second in {(a, b), (b, a)}:
                kernel = np.outer(MASKS[first], MASKS[second]).astype(float)
                kernel /= np.sqrt((kernel**2).sum())
                total = [
                    abs((gray[n, y : y + 5, x : x + 5] * kernel).sum()) for y in range(9 - 4) for x in range(7 - 4)
                ]
                found.append(np.mean(total))
            expected[n, k] = np.mean(found)
    np.testing.assert_allclose(texture_energies(images).numpy(), expected, rtol=1e-12)


def test_brightness_is_no_texture_and_white_noise_has_all_alike() -> None:
    images = noise(64, 1, 48, 48)
    energies = texture_energies(images)
    torch.testing.assert_close(energies, texture_energies(images + 3.0), rtol=1e-9, atol=1e-9)
    shares = (energies / energies.sum(1, keepdim=True)).mean(0)
    assert float((shares - 1 / 9).abs().max()) < 0.003
    stripes = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    stripes[..., ::2] = 1.0  # the finest ripple across, the same along
    (energies,) = texture_energies(stripes)
    assert TEXTURES[int(energies.argmax())] == "LR"
    assert float(energies[TEXTURES.index("EE")]) < 1e-12


def test_hinges_are_those_of_the_definition() -> None:
    term = TextureShares(upper=0.3, lower=0.5, least=0.015)
    images = torch.cat([noise(2, 3, 16, 16), noise(2, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)])
    shares = texture_energies(images).numpy()
    shares /= shares.sum(1, keepdims=True)
    expected = 0.0
    for row in shares:
        expected += sum(max(p - 0.3, 0) for p in row) + sum(max(0.015 - p, 0) for p in row)
        expected += max(0.5 - sum(sorted(row)[-3:]), 0)
    assert float(term(look(images))) == pytest.approx(expected / 4, rel=1e-9)
    assert expected > 0.3  # noise is flat, blocks are dominated
    halves = [float(term(look(images[part], batch=4))) for part in (slice(0, 1), slice(1, 4))]
    assert sum(halves) == pytest.approx(expected / 4, rel=1e-9)
    assert float(term(look(torch.zeros(1, 1, 8, 8)))) < 1  # no division by zero


def test_gradient_and_descent() -> None:
    term = TextureShares()
    images = noise(2, 1, 8, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(look(x)), images)
    x = noise(4, 1, 16, 16).requires_grad_()
    optimiser, first = torch.optim.Adam([x], 0.05), float(term(look(x)))
    for _ in range(60):
        optimiser.zero_grad()
        term(look(x)).backward()
        optimiser.step()
    assert float(term(look(x))) < 0.2 * first
