"""Terms on what the network gives, without classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["OutputRange"]


@dataclass(frozen=True)
class _Bound:
    """The term on the outputs of one network."""

    outputs: tuple[str, ...]

    @property
    def fetch(self) -> Sequence[str]:
        """The outputs."""
        return self.outputs

    def __call__(self, look: Look) -> Tensor:
        """Minus the mean spread."""
        total = look.images.new_zeros(())
        for name in self.outputs:
            flat = look.values[name].flatten(1)
            total = total - (flat.amax(1) - flat.amin(1)).sum() / look.batch
        return total


@dataclass(frozen=True)
class OutputRange:
    """Ask for decided outputs: minus the distance between an output's largest and smallest number, mean over images, summed over outputs.

    Sony's data generation (WACV 2025, released as ``NEGATIVE_MIN_MAX_DIFF`` in its Model Compression Toolkit). It needs no classes.

    Attributes:
        weight: Its weight.
    """

    weight: float = 1e-5
    name: str = "decided"
    separable: bool = True
    needs_labels: bool = False

    def bind(self, context: Context) -> BoundTerm:
        """The term on the floating-point outputs."""
        names = [spec.name for spec in context.model.outputs if spec.dtype.kind == "f"]
        return _Bound(tuple(names))
