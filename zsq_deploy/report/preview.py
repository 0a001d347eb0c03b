"""A contact sheet of calibration images, as a picture that the report carries inside itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["contact_sheet"]

Array = npt.NDArray[Any]


def _pixels(
    images: Array, mean: Sequence[float] | None, std: Sequence[float] | None, raw_pixels: bool
) -> tuple[npt.NDArray[np.uint8], str]:
    """Network inputs [N, C, H, W] as uint8 [N, H, W, 3 or 1], and what was done to channels that are no colours."""
    shown = np.asarray(images, np.float64)
    channels = shown.shape[1]
    if channels not in (1, 3):
        flat = shown[:, 0].reshape(len(shown), -1)
        low, high = np.percentile(flat, [1, 99], axis=1)
        wide = np.where(high > low, high - low, 1.0)
        shown = ((shown[:, :1] - low[:, None, None, None]) / wide[:, None, None, None]) * 255
        note = f"first of {channels} channels, contrast stretched"
    else:
        if not raw_pixels:
            per_channel = (1, -1, 1, 1)
            if std is not None:
                shown = shown * np.asarray(std, np.float64).reshape(per_channel)
            if mean is not None:
                shown = shown + np.asarray(mean, np.float64).reshape(per_channel)
            shown = shown * 255
        note = ""
    shown = np.nan_to_num(shown, nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(np.clip(shown, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1), note


def contact_sheet(
    images: Array,
    *,
    total: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    raw_pixels: bool = False,
    limit: int = 24,
    columns: int = 12,
    size: int = 84,
    gap: int = 4,
) -> dict[str, Any] | None:
    """The first images of a set side by side, as ``calibration.preview`` of the report.

    Small images are enlarged without smoothing, large ones are scaled down.

    Args:
        images: Network inputs, float [N, C, H, W].
        total: How many images the set has, where `images` are only its first ones.
        mean: Of the preprocessing, to undo it.
        std: Of the preprocessing.
        raw_pixels: The network takes 0..255.
        limit: How many images are shown at most.
        columns: How many stand in one row.
        size: Longer side of one image in the picture, in pixels.
        gap: Pixels between images; transparent.

    Returns:
        ``None`` for inputs that are no images (another rank, or none at all).
    """
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        return None
    count = min(limit, len(images))
    pixels, note = _pixels(images[:count], mean, std, raw_pixels)
    height, width = pixels.shape[1:3]
    factor = size / max(height, width)
    shape = (max(1, round(width * factor)), max(1, round(height * factor)))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = Image.new("RGBA", (columns * (shape[0] + gap) - gap, rows * (shape[1] + gap) - gap), (0, 0, 0, 0))
    way = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for index, picture in enumerate(pixels):
        tile = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert("RGB").resize(shape, way)
        sheet.paste(tile, ((index % columns) * (shape[0] + gap), (index // columns) * (shape[1] + gap)))
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    of_all = max(len(images), total or 0)
    if count < of_all:
        which = f"The first {count} of {of_all} images"
    else:
        which = f"All {count} images" if count > 1 else "The only image"
    caption = f"{which}, {width}×{height}" + (f" ({note})" if note else "")
    return {
        "data_uri": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "file": None,
        "images": count,
        "columns": columns,
        "caption": caption,
    }
