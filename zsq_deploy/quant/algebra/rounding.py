"""Codes that make a layer's output error small, given how its inputs move together.

The squared error of an output channel with weight error ``e`` on inputs with second moment ``H`` is ``e' H e``. Choosing the codes that make it
smallest is a closest-vector problem; here it is done as Frantar et al. 2022 (*GPTQ*, arXiv:2210.17323, algorithm 1) and Behdin et al. 2023
(*QuantEase*, arXiv:2309.01885, algorithm 1) do: weights are rounded one after the other, each rounding error is made up for in the
weights that are not rounded yet, and afterwards single codes are exchanged for better ones until none is left. What the two papers
measure on text, comes here from the network itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["damped", "error_of", "round_weights", "search_scales"]

Codes = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def damped(hessian: Doubles, share: float) -> Doubles:
    """The matrix with `share` of its mean diagonal added to the diagonal, so that it can be inverted; ``[K, K]``."""
    level = float(np.mean(np.diagonal(hessian)))
    return hessian + np.eye(len(hessian)) * (share * level if level > 0 else 1.0)


def error_of(errors: Doubles, hessian: Doubles) -> Doubles:
    """``e' H e`` of every row of ``[O, K]``: ``[O]``."""
    found: Doubles = np.einsum("ok,ok->o", errors @ hessian, errors)
    return found


def round_weights(steps: Doubles, hessian: Doubles, low: int, high: int, *, sweeps: int = 8) -> Codes:
    """Codes with a small squared error of the output.

    Args:
        steps: Weights in steps, ``w / scale + zero_point``: ``[O, K]``.
        hessian: Second moment of the inputs, positive definite, ``[K, K]``.
        low: Smallest code.
        high: Largest code.
        sweeps: Largest number of passes in which single codes are exchanged.

    Returns:
        Codes ``[O, K]`` within ``low .. high``: no other code of a single weight makes the error of its row smaller, unless the passes ended first;
        never worse than round-to-nearest.
    """
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    back = np.argsort(order)
    h, w = hessian[np.ix_(order, order)], steps[:, order]
    codes = _fed_forward(w, h, low, high)
    nearest = np.clip(np.rint(w), low, high)
    worse = error_of(codes - w, h) > error_of(nearest - w, h)
    codes[worse] = nearest[worse]
    _exchange(codes, w, h, low, high, sweeps)
    return codes[:, back].astype(np.int64)


def _fed_forward(steps: Doubles, hessian: Doubles, low: int, high: int) -> Doubles:
    """Rounded one after the other, errors made up for in the rest."""
    # Row k of the upper Cholesky factor of the inverse says how the error of weight k is spread over those behind it.
    inverse = np.linalg.inv(hessian)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    left, codes = steps.copy(), np.empty_like(steps)
    for k in range(steps.shape[1]):
        codes[:, k] = np.clip(np.rint(left[:, k]), low, high)
        missing = (left[:, k] - codes[:, k]) / factor[k, k]
        left[:, k + 1 :] -= missing[:, None] * factor[k, k + 1 :]
    return codes


def _exchange(codes: Doubles, steps: Doubles, hessian: Doubles, low: int, high: int, sweeps: int) -> None:
    """Every code in turn becomes the best one, given the others, until nothing changes."""
    diagonal = np.diagonal(hessian)
    slope = (codes - steps) @ hessian
    for _ in range(sweeps):
        changed = False
        for k in range(codes.shape[1]):
            if diagonal[k] <= 0:
                continue
            best = np.clip(np.rint(codes[:, k] - slope[:, k] / diagonal[k]), low, high)
            move = best - codes[:, k]
            rows = np.flatnonzero(move)
            if rows.size:
                changed = True
                codes[rows, k] = best[rows]
                slope[rows] += move[rows, None] * hessian[k]
        if not changed:
            return


def search_scales(
    weight: Doubles,
    hessian: Doubles,
    low: int,
    high: int,
    *,
    smallest: float = 0.4,
    candidates: int = 25,
    rounds: int = 2,
) -> tuple[Doubles, Codes]:
    """Symmetric scales and codes of every row with a small squared error of the output.

    Args:
        weight: ``[O, K]``.
        hessian: ``[K, K]``, positive definite.
        low: Smallest code.
        high: Largest code.
        smallest: Smallest share of the row's largest weight that may become the end of the grid.
        candidates: How many shares up to 1 are tried, each with :func:`round_weights` (without exchanges).
        rounds: How often the best one is refined: codes for the scale, scale for the codes.

    Returns:
        Scales ``[O]`` and codes ``[O, K]``.
    """
    largest = np.abs(weight).max(axis=1)
    full = np.where(largest > 0, largest / high, 1.0)
    best, scale = np.full(len(weight), np.inf), full.copy()
    for share in np.linspace(1.0, smallest, candidates):
        tried = full * share
        steps = weight / tried[:, None]
        error = error_of((round_weights(steps, hessian, low, high, sweeps=0) - steps) * tried[:, None], hessian)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
    codes = round_weights(weight / scale[:, None], hessian, low, high)
    best = error_of(codes * scale[:, None] - weight, hessian)
    for _ in range(rounds):
        along = codes @ hessian
        size = np.einsum("ok,ok->o", along, codes.astype(np.float64))
        fitted = np.where(size > 0, np.einsum("ok,ok->o", along, weight) / np.where(size > 0, size, 1.0), scale)
        fitted = np.where(fitted > 0, fitted, scale)
        again = round_weights(weight / fitted[:, None], hessian, low, high)
        error = error_of(again * fitted[:, None] - weight, hessian)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, fitted, scale)
        codes = np.where(better[:, None], again, codes)
    return scale, codes
