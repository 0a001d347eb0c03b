"""What detectors do around their network: suppressing overlapping boxes, pooling regions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """Boxes [..., 4] as y1, x1, y2, x2 with the smaller coordinates first."""
    if centred:
        x, y, w, h = boxes.unbind(-1)
        return torch.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], -1)
    y1, x1, y2, x2 = boxes.unbind(-1)
    return torch.stack([torch.minimum(y1, y2), torch.minimum(x1, x2), torch.maximum(y1, y2), torch.maximum(x1, x2)], -1)


def _keep(boxes: Tensor, scores: Tensor, limit: int, threshold: float) -> list[int]:
    """Greedy suppression: indices into `boxes`, best score first, equal scores in the order of their places."""
    order = torch.sort(scores, descending=True, stable=True).indices
    boxes = boxes[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept: list[int] = []
    for place in range(len(boxes)):
        if len(kept) == limit:
            break
        if not alive[place]:
            continue
        kept.append(int(order[place]))
        box = boxes[place]
        height = torch.minimum(box[2], boxes[:, 2]) - torch.maximum(box[0], boxes[:, 0])
        width = torch.minimum(box[3], boxes[:, 3]) - torch.maximum(box[1], boxes[:, 1])
        overlap = height.clamp(min=0) * width.clamp(min=0)
        union = area[place] + area - overlap
        # compared as a product: an empty union has no quotient
        alive &= ~((overlap > threshold * union) & (overlap > 0))
    return kept


@op("NonMaxSuppression", host=(2, 3, 4))
def non_max_suppression(node: Node) -> Kernel:
    """Rows of batch, class and box index that survive, class by class; no survivors without a positive limit."""
    centred = bool(node.get("center_point_box", 0))
    limits, thresholds, floors = node.ints(2), node.floats(3), node.floats(4)

    def kernel(boxes: Tensor, scores: Tensor, *given: Tensor | None) -> Tensor:
        limit, threshold, floor = (
            read(given[index] if index < len(given) else None)
            for index, read in enumerate((limits, thresholds, floors))
        )
        most = int(limit[0]) if limit else 0
        overlap = float(threshold[0]) if threshold else 0.0
        rows: list[tuple[int, int, int]] = []
        corners = _corners(boxes.detach().cpu(), centred)
        values = scores.detach().cpu()
        for batch in range(values.shape[0] if most > 0 else 0):
            for kind in range(values.shape[1]):
                one = values[batch, kind]
                places = torch.nonzero(one > floor[0]).reshape(-1) if floor else torch.arange(len(one))
                kept = _keep(corners[batch][places], one[places], most, overlap)
                rows.extend((batch, kind, int(places[index])) for index in kept)
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(boxes.device)

    return kernel


def _samples(
    start: float, length: float, bins: int, ratio: int, size: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Sampling positions along one axis of a region: lower and upper neighbour, weight of the upper, validity, samples a bin."""
    step = length / bins
    count = ratio if ratio > 0 else math.ceil(step)
    place = torch.arange(bins * count, device=x.device, dtype=torch.float64)
    inner = torch.remainder(place, max(count, 1))
    at = start + torch.div(place, max(count, 1), rounding_mode="floor") * step + (inner + 0.5) * step / max(count, 1)
    valid = (at >= -1.0) & (at <= size)
    at = at.clamp(0, size - 1)
    low = torch.floor(at)
    high = torch.clamp(low + 1, max=size - 1)
    return low.to(torch.int64), high.to(torch.int64), (at - low).to(x.dtype), valid.to(x.dtype), count


@op("RoiAlign")
def roi_align(node: Node) -> Kernel:
    """Bilinear samples in every bin of every region, averaged or maximal (He et al. 2017, section 3)."""
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    shift = 0.5 if node.get("coordinate_transformation_mode", default) == "half_pixel" else 0.0
    rows, columns = int(node.get("output_height", 1)), int(node.get("output_width", 1))
    ratio, scale = int(node.get("sampling_ratio", 0)), float(node.get("spatial_scale", 1.0))
    average = node.get("mode", "avg") == "avg"

    def kernel(x: Tensor, regions: Tensor, batch: Tensor) -> Tensor:
        found = []
        for region, sample in zip(regions.tolist(), batch.tolist(), strict=True):
            x1, y1, x2, y2 = (value * scale - shift for value in region)
            width, height = x2 - x1, y2 - y1
            if not shift:
                width, height = max(width, 1.0), max(height, 1.0)
            plane = x[int(sample)]
            top, bottom, wy, vy, ny = _samples(y1, height, rows, ratio, x.shape[2], x)
            left, right, wx, vx, nx = _samples(x1, width, columns, ratio, x.shape[3], x)
            if not ny * nx:
                found.append(plane.new_zeros((plane.shape[0], rows, columns)))
                continue
            wy, vy = wy.reshape(-1, 1), vy.reshape(-1, 1)
            upper, lower = plane[:, top], plane[:, bottom]
            corners = torch.stack(
                [
                    upper[:, :, left] * ((1 - wy) * (1 - wx)),
                    upper[:, :, right] * ((1 - wy) * wx),
                    lower[:, :, left] * (wy * (1 - wx)),
                    lower[:, :, right] * (wy * wx),
                ]
            ) * (vy * vx)
            if average:
                grid = corners.sum(0).reshape(-1, rows, ny, columns, nx)
                found.append(grid.mean((2, 4)))
            else:
                # ONNX takes the maximum over the four weighted neighbours, not over the interpolated samples
                grid = corners.amax(0).reshape(-1, rows, ny, columns, nx)
                found.append(grid.amax((2, 4)))
        return torch.stack(found) if found else x.new_zeros((0, x.shape[1], rows, columns))

    return kernel
