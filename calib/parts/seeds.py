"""Random numbers that depend on the seed and on what they are for, and on nothing else.

Every batch has its own generator, so a batch comes out the same whether it is the only one or one of a hundred, first or resumed.
Numbers are always drawn on the CPU: start images are then the same on every device.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["batch_generator"]


def batch_generator(seed: int, purpose: str, batch: int = 0) -> torch.Generator:
    """A CPU generator for one purpose (``"images"``, ``"swing"``, ...) of one batch."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{batch}".encode()).digest()
    generator = torch.Generator("cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
