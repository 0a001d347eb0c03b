"""How numbers become integers: bits, sign, symmetry, granularity, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from zsq_deploy.errors import UsageError

__all__ = ["Granularity", "Scheme"]


class Granularity(StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"


@dataclass(frozen=True)
class Scheme:
    """A uniform affine quantization scheme: ``q = clamp(rint(x / scale) + zero_point, qmin, qmax)``.

    Rounding is half to even everywhere, as in ONNX QuantizeLinear.

    Attributes:
        bits: 2 to 16.
        signed: Signed integers (``s8``) or unsigned (``u8``).
        symmetric: The zero point is fixed: 0 for signed, ``2**(bits-1)`` for unsigned types.
        granularity: One scale a tensor, a channel or a block.
        restricted: Symmetric signed types leave out the most negative code (-127..127).
        reduced: One bit less is used (-64..63 of s8): no int16 saturation on x86 without VNNI.
        block: Block length along the reduced axis; only with ``Granularity.BLOCK``.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = Granularity.TENSOR
    restricted: bool = False
    reduced: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UsageError(f"{self.bits} bits are not supported", where="Scheme.bits", remedy="choose 2 to 16 bits")
        if (self.granularity is Granularity.BLOCK) != (self.block > 0):
            raise UsageError(
                "a block length goes with block granularity, and only with it",
                where="Scheme.block",
                remedy="set both or neither",
            )
        if self.restricted and not (self.signed and self.symmetric):
            raise UsageError(
                "only a symmetric signed range can leave out its most negative code",
                where="Scheme.restricted",
                remedy="use restricted=False, or a signed symmetric scheme",
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        bits = self.bits - self.reduced
        if not self.signed:
            return 0
        return -(1 << (bits - 1)) + int(self.restricted)

    @property
    def qmax(self) -> int:
        """Largest code."""
        bits = self.bits - self.reduced
        return (1 << (bits - 1)) - 1 if self.signed else (1 << bits) - 1

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1

    def __str__(self) -> str:
        """Short form: ``u8 asymmetric per tensor``."""
        kind = f"{'s' if self.signed else 'u'}{self.bits}"
        where = f"per block of {self.block}" if self.block else f"per {self.granularity.value}"
        extra = (" restricted" if self.restricted else "") + (" reduced range" if self.reduced else "")
        return f"{kind} {'symmetric' if self.symmetric else 'asymmetric'} {where}{extra}"
