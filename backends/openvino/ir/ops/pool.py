"""Pooling."""

from __future__ import annotations

import math
from typing import Any

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, element_type, translates

__all__: list[str] = []


def _window(op: Op) -> tuple[dict[str, Any], bool]:
    """The attributes of the window, and whether the last windows reach beyond the padding in the way of OpenVINO's `ceil`."""
    kernel = [int(size) for size in op.attrs["kernel"]]
    rank = len(kernel)
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": [int(size) for size in op.attrs["strides"]]}
    dilations = [int(size) for size in op.attrs.get("dilations") or [1] * rank]
    if any(size != 1 for size in dilations):
        found["dilations"] = dilations
    how = str(op.attrs.get("auto_pad", "explicit")).lower()
    if how in ("same_upper", "same_lower"):
        found["auto_pad"] = how.upper()
    elif how == "valid":
        found["auto_pad"] = "VALID"
    else:
        found["pads"] = [int(size) for size in (*op.attrs["pads_begin"], *op.attrs["pads_end"])]
    rounding = str(op.attrs.get("rounding_type", "floor")).lower()
    return found, _rounded(op, found, dilations, rounding)


def _rounded(op: Op, found: dict[str, Any], dilations: list[int], rounding: str) -> bool:
    """Whether windows are left that begin behind the input; ONNX leaves them out, as OpenVINO's `ceil_torch` does."""
    if rounding == "floor" or "auto_pad" in found:
        return False
    found["ceil_mode"] = 1
    if rounding == "ceil_torch":
        return False
    rank = len(found["kernel_shape"])
    beyond = False
    for axis, size in enumerate(op.shape(0)[2:]):
        stride, before, after = found["strides"][axis], found["pads"][axis], found["pads"][rank + axis]
        if stride == 1:
            continue
        if size is None:
            raise UnsupportedFormError("rounding up for a size that is open")
        extent = (found["kernel_shape"][axis] - 1) * dilations[axis] + 1
        count = math.ceil((size + before + after - extent) / stride) + 1
        beyond = beyond or (count - 1) * stride >= size + before
    return beyond


@translates("MaxPool")
def max_pool(op: Op) -> None:
    """Largest value of every window; its flat position where that is read."""
    found, beyond = _window(op)
    if beyond:
        raise UnsupportedFormError("windows that begin behind the input")
    if op.outputs > 1 and list(op.node.output(1).get_target_inputs()):
        if int(op.attrs.get("axis", 0)) % op.rank(0) != 0:
            raise UnsupportedFormError("positions that are not counted in the whole tensor")
        places = op.writer.fresh(f"{op.output(1)}_i64")
        op.writer.node("MaxPool", [op.input(0)], [op.output(0), places], op.name, 2, **found)
        op.emit_as(places, "i64", str(op.node.output(1).get_element_type().get_type_name()), 1)
        return
    op.writer.node("MaxPool", [op.input(0)], [op.output()], op.name, 1, **found)


@translates("AvgPool")
def average_pool(op: Op) -> None:
    """Mean of every window, with or without the padding."""
    found, beyond = _window(op)
    if beyond:
        raise UnsupportedFormError("windows that begin behind the input")
    include = not bool(op.attrs.get("exclude-pad", op.attrs.get("exclude_pad", False)))
    op.emit("AveragePool", [op.input(0)], count_include_pad=int(include), **found)


@translates("AdaptiveAvgPool", "AdaptiveMaxPool")
def adaptive_pool(op: Op) -> None:
    """Pools of a given output size that divides the input's."""
    sizes, wanted = op.shape(0)[2:], op.ints(1)
    average = op.kind == "AdaptiveAvgPool"
    if op.outputs > 1 and list(op.node.output(1).get_target_inputs()):
        raise UnsupportedFormError("positions of the maxima")
    target = [op.output()]
    if all(size == 1 for size in wanted):
        op.writer.node("GlobalAveragePool" if average else "GlobalMaxPool", [op.input(0)], target, op.name, 1)
        return
    whole = [size for size in sizes if size is not None]
    if len(whole) < len(sizes) or any(size % out for size, out in zip(whole, wanted, strict=True)):
        raise UnsupportedFormError(f"output {wanted} for input {list(sizes)}: windows of different sizes")
    kernel = [size // out for size, out in zip(whole, wanted, strict=True)]
    op.writer.node(
        "AveragePool" if average else "MaxPool", [op.input(0)], target, op.name, 1, kernel_shape=kernel, strides=kernel
    )


@translates("ROIAlign")
def roi_align(op: Op) -> None:
    """Bilinear samples in every bin of every region."""
    aligned = str(op.attrs.get("aligned_mode", "asymmetric")).lower()
    if aligned == "half_pixel_for_nn":
        raise UnsupportedFormError("aligned_mode half_pixel_for_nn")
    op.emit(
        "RoiAlign",
        [op.input(0), op.input(1), op.input_as(2, "i64")],
        mode=str(op.attrs.get("mode", "avg")).lower(),
        output_height=int(op.attrs["pooled_h"]),
        output_width=int(op.attrs["pooled_w"]),
        sampling_ratio=int(op.attrs["sampling_ratio"]),
        spatial_scale=float(op.attrs["spatial_scale"]),
        coordinate_transformation_mode="output_half_pixel" if aligned == "asymmetric" else "half_pixel",
    )


@translates("NonMaxSuppression")
def non_max_suppression(op: Op) -> None:
    """Rows of batch, class and box index that survive; the scores and the count are left out."""
    for index in range(1, op.outputs):
        if list(op.node.output(index).get_target_inputs()):
            raise UnsupportedFormError("scores or counts of what survives")
    if bool(op.attrs.get("sort_result_descending", True)) and op.shape(1)[:2] != (1, 1):
        raise UnsupportedFormError("boxes sorted across classes")
    if op.has(5) and op.scalar(5) != 0.0:
        raise UnsupportedFormError("soft suppression")
    center = int(str(op.attrs.get("box_encoding", "corner")).lower() == "center")
    inputs = [op.input(0), op.input(1)]
    if op.has(2):
        inputs.append(op.step("Reshape", [op.input_as(2, "i64"), op.whole("one", [1])]))
    inputs += [op.step("Reshape", [op.input(k), op.whole("one", [1])]) for k in (3, 4) if op.has(k)]
    wanted = element_type(str(op.node.output(0).get_element_type().get_type_name()))
    if wanted == element_type("i64"):
        op.writer.node("NonMaxSuppression", inputs, [op.output()], op.name, 1, center_point_box=center)
        return
    found = op.step("NonMaxSuppression", inputs, center_point_box=center)
    op.writer.node("Cast", [found], [op.output()], op.name, 1, to=wanted)
