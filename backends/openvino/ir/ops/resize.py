"""Resampling."""

from __future__ import annotations

from typing import Any

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, translates

__all__: list[str] = []

_MODE = {"nearest": "nearest", "linear": "linear", "linear_onnx": "linear", "cubic": "cubic"}
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


@translates("Interpolate")
def interpolate(op: Op) -> None:
    """Nearest, linear and cubic resampling of some axes, by sizes or by scales."""
    if op.version in ("opset1", ""):
        raise UnsupportedFormError("the form of opset1")
    mode = str(op.attrs["mode"]).lower()
    if mode not in _MODE:
        raise UnsupportedFormError(f"mode {mode!r}")
    found: dict[str, Any] = {"mode": _MODE[mode]}
    coordinates = str(op.attrs.get("coordinate_transformation_mode", "half_pixel")).lower()
    nearest = str(op.attrs.get("nearest_mode", "round_prefer_floor")).lower()
    if coordinates == "tf_half_pixel_for_nn":
        # floor((x + 1/2) / scale) is the nearest to the half-pixel position, ties upwards
        if mode != "nearest" or nearest != "floor":
            raise UnsupportedFormError(f"coordinates {coordinates!r} with {nearest!r}")
        coordinates, nearest = "half_pixel", "round_prefer_ceil"
    if coordinates not in _COORDINATES:
        raise UnsupportedFormError(f"coordinates {coordinates!r}")
    found["coordinate_transformation_mode"] = coordinates
    if mode == "nearest":
        if nearest == "simple":
            raise UnsupportedFormError("nearest_mode 'simple'")
        found["nearest_mode"] = nearest
    if mode == "cubic":
        found["cubic_coeff_a"] = float(op.attrs.get("cube_coeff", -0.75))
    if bool(op.attrs.get("antialias", False)) and mode != "nearest":
        found["antialias"] = 1
    value = op.input(0)
    begin, end = (list(op.attrs.get(name) or [0]) for name in ("pads_begin", "pads_end"))
    if any(begin) or any(end):
        rank = op.rank(0)
        pads = [(list(side) + [0] * rank)[:rank] for side in (begin, end)]
        value = op.step("Pad", [value, op.whole("pads", [int(item) for item in (*pads[0], *pads[1])])])
    older = op.version == "opset4"
    by_sizes = str(op.attrs.get("shape_calculation_mode", "sizes")).lower() == "sizes"
    source = (1 if by_sizes else 2) if older else 1
    place = 3 if older else 2
    axes = op.ints(place) if op.has(place) else list(range(op.rank(0)))
    target = ["", op.input_as(source, "i64")] if by_sizes else [op.input_as(source, "f32")]
    op.emit("Resize", [value, "", *target], axes=axes, **found)
