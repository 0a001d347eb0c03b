"""In what precision the network runs while images are made."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from zsq_deploy.errors import UsageError

__all__ = ["PRECISIONS", "Precision", "mixed", "resolved"]

Precision = Literal["float32", "bfloat16"]

#: What a user may ask for.
PRECISIONS = ("float32", "bfloat16", "auto")


def resolved(word: str, device: torch.device) -> Precision:
    """The precision that a word means on a device: ``auto`` is bfloat16 on a GPU that computes in it, else float32.

    Raises:
        UsageError: There is no such precision.
    """
    if word not in PRECISIONS:
        raise UsageError(
            f"there is no precision {word!r}",
            where="--image-precision",
            remedy=f"choose one of {', '.join(PRECISIONS)}",
        )
    if word == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float32"
    return "bfloat16" if word == "bfloat16" else "float32"


def mixed(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside the block, convolutions and matrix products round what they read to bfloat16 (and add up in float32)."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
