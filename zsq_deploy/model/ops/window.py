"""What convolution and pooling share: kernel, strides, dilations, padding, and the size of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zsq_deploy.model.ops.registry import Node

__all__ = ["Window", "torch_padding"]


def torch_padding(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Pads per spatial axis in the order of ``torch.nn.functional.pad``: last axis first, begin and end in turn."""
    return [pad for pair in zip(reversed(list(begin)), reversed(list(end)), strict=True) for pad in pair]


@dataclass(frozen=True)
class Window:
    """Sliding-window attributes of a node; empty tuples stand for the defaults (all ones, no padding)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    ceil_mode: bool

    @classmethod
    def of(cls, node: Node) -> Window:
        """Read the attributes."""

        def ints(name: str) -> tuple[int, ...]:
            return tuple(int(value) for value in node.get(name) or ())

        return cls(
            ints("kernel_shape"),
            ints("strides"),
            ints("dilations"),
            ints("pads"),
            str(node.get("auto_pad", "NOTSET")),
            bool(node.get("ceil_mode", 0)),
        )

    def resolved(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides and dilations for `rank` spatial axes."""
        return self.strides or (1,) * rank, self.dilations or (1,) * rank

    @property
    def static_symmetric(self) -> tuple[int, ...] | int | None:
        """The padding as torch's layers take it, when it is known now and the same on both sides; otherwise ``None``."""
        if self.auto_pad == "VALID" or (self.auto_pad == "NOTSET" and not any(self.pads)):
            return 0
        half = len(self.pads) // 2
        if self.auto_pad == "NOTSET" and self.pads[:half] == self.pads[half:] and min(self.pads) >= 0:
            return self.pads[:half]
        return None

    def padding(self, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
        """Pads before and after every spatial axis for an input of the given sizes."""
        rank = len(sizes)
        strides, dilations = self.resolved(rank)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            begin, end = [], []
            for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
                extent = (length - 1) * dilation + 1
                total = max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
                small, large = total // 2, total - total // 2
                begin.append(small if self.auto_pad == "SAME_UPPER" else large)
                end.append(large if self.auto_pad == "SAME_UPPER" else small)
            return begin, end
        if self.auto_pad == "VALID" or not self.pads:
            return [0] * rank, [0] * rank
        return list(self.pads[:rank]), list(self.pads[rank:])

    def output_sizes(
        self, sizes: Sequence[int], kernel: Sequence[int], begin: Sequence[int], end: Sequence[int]
    ) -> list[int]:
        """Number of window positions per axis; in ceil mode the last window must begin inside the input or its left padding."""
        strides, dilations = self.resolved(len(sizes))
        found = []
        for axis, size in enumerate(sizes):
            extent = (kernel[axis] - 1) * dilations[axis] + 1
            span = size + begin[axis] + end[axis] - extent
            if self.ceil_mode:
                count = math.ceil(span / strides[axis]) + 1
                if (count - 1) * strides[axis] >= size + begin[axis]:
                    count -= 1
            else:
                count = span // strides[axis] + 1
            found.append(count)
        return found
