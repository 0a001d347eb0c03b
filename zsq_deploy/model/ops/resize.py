"""Resampling: Resize, GridSample and AffineGrid.

Resize is separable. For each axis a matrix [out, in] holds the interpolation weights (nearest: an index); the common cases of the
networks at hand (whole factors, bilinear) go to torch's own kernels instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, UnsupportedVariantError, op

__all__ = ["Resampling", "axis_index", "axis_matrix"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Resampling:
    """The attributes of Resize that decide an axis's weights."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool


def _positions(out: int, size: int, scale: float, roi: tuple[float, float], how: str, kind: type) -> Array:
    """Where every output element lies in the input, in elements."""
    x: Array = np.arange(out, dtype=kind)
    factor = kind(scale)
    if how == "half_pixel" or (how == "pytorch_half_pixel" and out > 1):
        return np.asarray((x + kind(0.5)) / factor - kind(0.5))
    if how == "pytorch_half_pixel":
        return np.zeros(out, kind)
    if how == "half_pixel_symmetric":
        adjustment = kind(out) / (factor * kind(size))
        offset = kind(size) / kind(2) * (kind(1) - adjustment)
        return np.asarray(offset + (x + kind(0.5)) / factor - kind(0.5))
    if how == "align_corners":
        return np.zeros(out, kind) if out == 1 else np.asarray(x * kind(size - 1) / kind(out - 1))
    if how == "asymmetric":
        return np.asarray(x / factor)
    start, end = kind(roi[0]), kind(roi[1])  # tf_crop_and_resize
    if out == 1:
        return np.asarray([kind(0.5) * (start + end) * kind(size - 1)])
    return np.asarray(start * kind(size - 1) + x * (end - start) * kind(size - 1) / kind(out - 1))


def axis_index(out: int, size: int, scale: float, roi: tuple[float, float], how: Resampling) -> Array:
    """For nearest: the input element of every output element.

    Positions are worked out in float32, as runtimes do it: which neighbour is nearest depends on the last bit.
    """
    x = _positions(out, size, scale, roi, how.coordinates, np.float32)
    if how.nearest == "round_prefer_floor":
        index = np.ceil(x - np.float32(0.5))
    elif how.nearest == "round_prefer_ceil":
        index = np.floor(x + np.float32(0.5))
    else:
        index = np.floor(x) if how.nearest == "floor" else np.ceil(x)
    return np.clip(index.astype(np.int64), 0, size - 1)


def _cubic(distance: Array, a: float) -> Array:
    """Keys' convolution kernel (1981) with free parameter a."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def axis_matrix(out: int, size: int, scale: float, roi: tuple[float, float], how: Resampling) -> Array:
    """Weights [out, in] of linear and cubic interpolation, float64."""
    x = _positions(out, size, scale, roi, how.coordinates, np.float64)
    shrink = min(scale, 1.0) if how.antialias else 1.0
    reach = 1 if how.mode == "linear" else 2
    first = math.floor(-reach / shrink) + 1
    offsets = np.arange(first, 2 - first)
    base = np.floor(x)
    # a position on an element belongs to the window that ends there, so that antialiased windows stay symmetric
    base = np.where((base == x) & (shrink < 1.0), base - 1, base)
    places = base[:, None] + offsets[None, :]
    distance = (places - x[:, None]) * shrink
    weights = np.clip(1 - np.abs(distance), 0, None) if how.mode == "linear" else _cubic(distance, how.cubic_a)
    if how.exclude_outside:
        weights = np.where((places < 0) | (places > size - 1), 0.0, weights)
    if how.exclude_outside or how.antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((out, size))
    columns = np.clip(places.astype(np.int64), 0, size - 1)
    np.add.at(matrix, (np.arange(out)[:, None], columns), weights)
    return matrix


@lru_cache(maxsize=256)
def _cached_index(out: int, size: int, scale: float, roi: tuple[float, float], how: Resampling) -> Array:
    return axis_index(out, size, scale, roi, how)


@lru_cache(maxsize=256)
def _cached_matrix(out: int, size: int, scale: float, roi: tuple[float, float], how: Resampling) -> Array:
    return axis_matrix(out, size, scale, roi, how)


def _targets(
    x: Tensor, axes: list[int], scales: list[float] | None, sizes: list[int] | None, policy: str
) -> list[tuple[int, int, float]]:
    """(axis, output size, scale) for every axis that is resized."""
    if sizes:
        factors = [size / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
        if policy != "stretch":
            common = min(factors) if policy == "not_larger" else max(factors)
            return [(axis, math.floor(common * x.shape[axis] + 0.5), common) for axis in axes]
        return list(zip(axes, sizes, factors, strict=True))
    assert scales is not None
    # scales are float32 in the file: 0.6 * 5 must give 3 and not 2
    return [
        (axis, math.floor(float(np.float32(scale) * np.float32(x.shape[axis]))), scale)
        for axis, scale in zip(axes, scales, strict=True)
    ]


def _native(x: Tensor, targets: list[tuple[int, int, float]], how: Resampling) -> Tensor | None:
    """Torch's own kernel where it computes exactly the same; otherwise ``None``."""
    if x.dim() != 4 or not x.is_floating_point() or how.antialias or how.coordinates == "tf_crop_and_resize":
        return None
    if any(axis not in (2, 3) for axis, _, _ in targets):
        return None
    wanted = list(x.shape[2:])
    exact = True
    for axis, out, scale in targets:
        wanted[axis - 2] = out
        exact = exact and math.isclose(scale * x.shape[axis], out, rel_tol=1e-9)
    if how.mode == "nearest":
        whole = all(out % x.shape[axis] == 0 for axis, out, _ in targets) and exact
        same = (how.coordinates == "asymmetric" and how.nearest == "floor") or (
            how.coordinates in ("half_pixel", "half_pixel_symmetric") and how.nearest.startswith("round_prefer")
        )
        return F.interpolate(x, wanted, mode="nearest") if whole and same else None
    if how.mode == "linear" and min(wanted) > 1:
        if how.coordinates == "align_corners":
            return F.interpolate(x, wanted, mode="bilinear", align_corners=True)
        if how.coordinates in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric") and exact:
            return F.interpolate(x, wanted, mode="bilinear", align_corners=False) if not how.exclude_outside else None
    return None


@op("Resize", host=(1, 2, 3))
def resize(node: Node) -> Kernel:
    """Nearest, linear and cubic resampling with every coordinate transformation of opset 13 to 21, antialiasing included."""
    how = Resampling(
        str(node.get("mode", "nearest")),
        str(node.get("coordinate_transformation_mode", "half_pixel")),
        str(node.get("nearest_mode", "round_prefer_floor")),
        float(node.get("cubic_coeff_a", -0.75)),
        bool(node.get("exclude_outside", 0)),
        bool(node.get("antialias", 0)),
    )
    known = {
        "half_pixel",
        "half_pixel_symmetric",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
        "tf_crop_and_resize",
    }
    if how.coordinates not in known:
        raise UnsupportedVariantError(f"coordinate transformation {how.coordinates!r}")
    outside = float(node.get("extrapolation_value", 0.0))
    policy = str(node.get("keep_aspect_ratio_policy", "stretch"))
    chosen = node.get("axes")
    rois, factors, whole = node.floats(1), node.floats(2), node.floats(3)

    def kernel(x: Tensor, *given: Tensor | None) -> Tensor:
        roi, scales, sizes = (
            read(given[index] if index < len(given) else None) for index, read in enumerate((rois, factors, whole))
        )
        axes = list(range(x.dim())) if chosen is None else [int(axis) % x.dim() for axis in chosen]
        targets = _targets(x, axes, scales or None, [int(size) for size in sizes] if sizes else None, policy)
        spans = {
            axis: (roi[place], roi[place + len(axes)])
            if roi and how.coordinates == "tf_crop_and_resize"
            else (0.0, 1.0)
            for place, axis in enumerate(axes)
        }
        moved = [
            (axis, out, scale)
            for axis, out, scale in targets
            if out != x.shape[axis] or scale != 1.0 or spans[axis] != (0.0, 1.0)
        ]
        if not moved:
            return x
        native = _native(x, moved, how)
        if native is not None:
            return native
        missing: Tensor | None = None
        source = list(x.shape)
        y = x if x.is_floating_point() or how.mode == "nearest" else x.to(torch.float32)
        for axis, out, scale in moved:
            if how.mode == "nearest":
                index = torch.from_numpy(_cached_index(out, source[axis], scale, spans[axis], how)).to(x.device)
                y = torch.index_select(y, axis, index)
            else:
                matrix = torch.from_numpy(_cached_matrix(out, source[axis], scale, spans[axis], how)).to(y)
                y = torch.matmul(y.movedim(axis, -1), matrix.T).movedim(-1, axis)
            if how.coordinates == "tf_crop_and_resize":
                at = _positions(out, source[axis], scale, spans[axis], how.coordinates, np.float64)
                view = [1] * x.dim()
                view[axis] = out
                beyond = torch.from_numpy((at < 0) | (at > source[axis] - 1)).reshape(view).to(x.device)
                missing = beyond if missing is None else missing | beyond
        if missing is not None:
            y = torch.where(missing, torch.full((), outside, dtype=y.dtype, device=y.device), y)
        return y if y.dtype == x.dtype else torch.round(y).to(x.dtype)

    return kernel


@op("GridSample", since=16)
def grid_sample(node: Node) -> Kernel:
    """Samples at normalized positions (Jaderberg et al. 2015); "bilinear" of opset 16 is "linear" of opset 20."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        str(node.get("mode", "linear")), str(node.get("mode", "linear"))
    )
    padding, align = str(node.get("padding_mode", "zeros")), bool(node.get("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=align)


@op("AffineGrid", since=20, host=(1,))
def affine_grid(node: Node) -> Kernel:
    """Normalized positions of an affinely moved image or volume."""
    align, read = bool(node.get("align_corners", 0)), node.ints(1)
    return lambda theta, given: F.affine_grid(theta, read(given) or [], align_corners=align)
