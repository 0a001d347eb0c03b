"""TensorRT's calibration caches: text files that hold one scale a tensor, made and read without TensorRT.

A cache looks like this::

    TRT-8602-EntropyCalibration2
    images: 3c010204
    (Unnamed Layer* 64) [Shuffle]_output: 3c56713e

The first line names the TensorRT that may read it (see :func:`version_number`) and the algorithm that made it. Every other line names a
tensor of TensorRT's network and, in hexadecimal without leading zeros, the bits of its float32 *scale*: the largest magnitude that int8
represents, divided by 127. ``3c010204`` is 0.007874 = 1/127, an input between -1 and 1. TensorRT itself writes ``0`` for a tensor that no
calibration image excited, and leaves that tensor in float. (Format: files that TensorRT 7, 8 and 10 wrote, and the reader in ONNX
Runtime's TensorRT provider. A common mistake of hand-made caches is to store 127/amax, the inverse.)

When another version or another algorithm is asked for than the header says, TensorRT ignores the file and calibrates anew, without a
word. :meth:`CalibrationCache.check_reader` turns that into an error.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from zsq_deploy.artifact import digest_bytes
from zsq_deploy.errors import CalibrationError, StaleArtifactError, UsageError
from zsq_deploy.quant.ranges import Ranges

__all__ = ["ALGORITHMS", "CalibrationCache", "scale_bits", "some", "version_number", "version_text"]

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "entropy-2": "EntropyCalibration2",
        "minmax": "MinMaxCalibration",
        "legacy": "LegacyCalibration",
        "entropy": "EntropyCalibration",
    }
)
"""Names on the command line -> algorithms as the header of a cache spells them. The first one is TensorRT's recommended one."""

_CODES = 127.0
_HEADER = re.compile(r"TRT-(\d{4,6})-([A-Za-z0-9]+)")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_UNNAMED = re.compile(r"\(Unnamed Layer\* \d+\) \[.+\]")
_REMAKE = "make the cache again: zsq quantize --target tensorrt-8 (or tensorrt-10) writes one"


def version_number(version: str) -> int:
    """The number that stands in the header of a cache, from a version such as ``8.6.2`` or ``10.3.0.26``.

    Up to TensorRT 9 it is ``major * 1000 + minor * 100 + patch``, from 10 on ``major * 10000 + minor * 100 + patch``.

    Raises:
        UsageError: That is no version, or one without calibration (11 and later).
    """
    parts = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:[^\d].*)?", version.strip())
    if parts is None:
        raise UsageError(
            f"{version!r} is not a version of TensorRT",
            where="TensorRT version",
            remedy="give three numbers, as in 8.6.2 or 10.3.0; on the device: dpkg -l | grep nvinfer, or tensorrt.__version__",
        )
    major, minor, patch = (int(part) for part in parts.groups())
    if major >= 11:
        raise UsageError(
            f"TensorRT {version} reads no calibration cache: calibration was removed in 11",
            where="TensorRT version",
            remedy="use the explicit Q/DQ graph (--target tensorrt-11)",
        )
    if minor > 99 or patch > 99:
        raise UsageError(f"{version!r} is not a version of TensorRT", where="TensorRT version", remedy="check it")
    return major * (10_000 if major >= 10 else 1_000) + minor * 100 + patch


def version_text(number: int) -> str:
    """The version that a header's number stands for, ``8.6.2`` for 8602 and ``10.3.0`` for 100300."""
    base = 10_000 if number >= 100_000 else 1_000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def scale_bits(scale: float) -> str:
    """A scale as a cache spells it: the bits of the float32 in hexadecimal, without leading zeros."""
    return f"{struct.unpack('>I', struct.pack('>f', scale))[0]:x}"


def _scale_of(bits: str) -> float:
    return float(struct.unpack(">f", bytes.fromhex(bits.zfill(8)))[0])


@dataclass(frozen=True, eq=False)
class CalibrationCache:
    """The scales of a network's tensors, as TensorRT's int8 calibration leaves them.

    Attributes:
        version: Version of TensorRT as the header's number (``8602``).
        algorithm: As the header spells it (``EntropyCalibration2``).
        scales: Tensor name to scale, in the tensor's unit a code; exactly representable in float32. In the file's order; read-only.
        left_out: Tensors of :meth:`from_ranges` that were zero on every image and got no scale.
    """

    version: int
    algorithm: str
    scales: Mapping[str, float]
    left_out: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS.values():
            raise UsageError(
                f"there is no calibration algorithm {self.algorithm!r}",
                where="calibration cache",
                remedy=f"choose one of {', '.join(ALGORITHMS.values())}",
            )
        clean: dict[str, float] = {}
        for name, scale in self.scales.items():
            if not name or "\n" in name or "\r" in name:
                raise CalibrationError(
                    f"a calibration cache cannot hold a tensor of the name {name!r}",
                    where="calibration cache",
                    remedy="give the tensor a name without line breaks",
                )
            value = float(np.float32(scale))
            if not math.isfinite(value) or value < 0:
                raise CalibrationError(
                    f"the scale of {name!r} is not usable: {scale}",
                    where=name,
                    remedy="look for NaN or infinite values in the network or in the calibration set",
                )
            clean[name] = value
        object.__setattr__(self, "scales", MappingProxyType(clean))

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.scales)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrationCache) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def title(self) -> str:
        """In a few words: ``TensorRT 8.6.2 EntropyCalibration2``."""
        return f"TensorRT {version_text(self.version)} {self.algorithm}"

    @property
    def digest(self) -> str:
        """SHA-256 of the file that :func:`write_cache` writes."""
        return digest_bytes(self.to_bytes())

    @property
    def unexcited(self) -> tuple[str, ...]:
        """Tensors whose scale is zero: TensorRT leaves them in float."""
        return tuple(name for name, scale in self.scales.items() if scale == 0.0)

    def amax(self, name: str) -> float:
        """The largest magnitude that a tensor's int8 codes represent, in the tensor's unit."""
        return float(np.float32(self.scales[name]) * np.float32(_CODES))

    @classmethod
    def from_ranges(
        cls,
        ranges: Mapping[str, tuple[float, float]],
        *,
        version: str,
        algorithm: str = "EntropyCalibration2",
        names: Collection[str] | None = None,
    ) -> CalibrationCache:
        """The cache that our ranges mean: ``scale = max(|low|, |high|) / 127``, rounded to float32.

        (For float32 ranges this is the float32 quotient: dividing in float64 first never changes the rounding.)

        A tensor that was zero on every image has no scale; it is left out (TensorRT then leaves it in float) and named in
        :attr:`left_out`.

        Args:
            ranges: Value name to ``(low, high)``, a :class:`~zsq_deploy.quant.Ranges` or any mapping.
            version: TensorRT on the device, ``8.6.2``.
            algorithm: What the header says; it must be the one of the calibrator that the builder is given, whatever found the
                ranges (``trtexec --calib`` reads ``EntropyCalibration2``).
            names: Only these tensors; ``None``: all.

        Raises:
            CalibrationError: A tensor of `names` has no range, or a range is not finite.
            UsageError: Unknown algorithm or version.
        """
        wanted = list(ranges) if names is None else list(names)
        missing = [name for name in wanted if name not in ranges]
        if missing:
            raise CalibrationError(
                f"{len(missing)} tensors have no range: {some(missing)}",
                where=missing[0],
                remedy="collect the ranges of the same graph that TensorRT is given",
            )
        scales: dict[str, float] = {}
        left_out: list[str] = []
        for name in wanted:
            low, high = ranges[name]
            amax = max(abs(float(low)), abs(float(high)))
            if not math.isfinite(float(low)) or not math.isfinite(float(high)):
                amax = math.nan
            with np.errstate(over="ignore", under="ignore"):
                scale = float(np.float32(amax / _CODES))
            if scale == 0.0:
                left_out.append(name)
            else:
                scales[name] = scale
        return cls(version_number(version), algorithm, scales, tuple(left_out))

    @classmethod
    def parse(cls, data: bytes | str, *, where: str = "calibration cache", zeros: bool = False) -> CalibrationCache:
        """Read the text of a cache.

        Args:
            data: The file's content.
            where: Named in errors.
            zeros: Accept tensors with the scale 0 (TensorRT writes them for tensors that no image excited).

        Raises:
            CalibrationError: No such header, an unknown algorithm, a truncated file, a line that is no entry, a name twice, or a
                scale that is NaN, infinite, negative or (unless `zeros`) zero. Each says the line.
        """
        if isinstance(data, bytes):
            try:
                data = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"this is no calibration cache: it is not text (byte {error.start})", where=where, remedy=_REMAKE
                ) from error
        lines = data.split("\n")
        header = lines[0].rstrip("\r")
        found = _HEADER.fullmatch(header)
        if found is None:
            raise CalibrationError(
                f"this is no calibration cache: its first line is {header[:60]!r}, not TRT-<version>-<algorithm>"
                if header
                else "this is no calibration cache: its first line is empty",
                where=f"{where}, line 1",
                remedy="give a file that TensorRT or zsq wrote; ONNX Runtime's tables are read as tables",
            )
        number, algorithm = int(found[1]), found[2]
        if algorithm not in ALGORITHMS.values():
            raise CalibrationError(
                f"the cache's algorithm is {algorithm!r}, which no calibrator has",
                where=f"{where}, line 1",
                remedy=f"known are {', '.join(ALGORITHMS.values())}; {_REMAKE}",
            )
        if len(lines) < 2 or lines[-1] != "":
            raise CalibrationError(
                "the calibration cache is truncated: its last line has no end"
                if len(lines) > 1
                else "the calibration cache is truncated: it ends with its header",
                where=f"{where}, line {len(lines)}",
                remedy="copy it again or make it again; if it is whole, end the last line with a line break",
            )
        scales: dict[str, float] = {}
        for at, line in enumerate(lines[1:-1], 2):
            name, scale = _entry(line.rstrip("\r"), f"{where}, line {at}", zeros=zeros)
            if name in scales:
                raise CalibrationError(
                    f"the tensor {name!r} stands in the cache twice", where=f"{where}, line {at}", remedy=_REMAKE
                )
            scales[name] = scale
        if not scales:
            raise CalibrationError("the calibration cache holds no tensor", where=where, remedy=_REMAKE)
        return cls(number, algorithm, scales)

    def to_bytes(self) -> bytes:
        """The file: header and one line a tensor, in this order, each ended by a line feed."""
        lines = [
            f"TRT-{self.version}-{self.algorithm}",
            *(f"{name}: {scale_bits(s)}" for name, s in self.scales.items()),
        ]
        return ("\n".join(lines) + "\n").encode()

    def to_ranges(self, *, model_digest: str = "", set_digest: str = "") -> Ranges:
        """What the cache means: ``-127 * scale .. 127 * scale`` for every tensor with a scale.

        The product is exact in float64, so :meth:`from_ranges` gives the same scales again, bit for bit.
        """
        notes = tuple(f"no range, stays in float: {name}" for name in self.unexcited)
        return Ranges(
            {name: (-_CODES * s, _CODES * s) for name, s in self.scales.items() if s > 0.0},
            self.title,
            model_digest,
            set_digest,
            notes,
        )

    def check_reader(self, version: str, algorithm: str | None = None, *, where: str = "calibration cache") -> None:
        """Make sure that TensorRT of this version will not ignore the cache.

        Args:
            version: ``tensorrt.__version__`` on the device.
            algorithm: Of the calibrator that will be asked, as the header spells it; ``None``: any.
            where: Named in errors.

        Raises:
            StaleArtifactError: It would calibrate anew.
        """
        number = version_number(version)
        if number != self.version:
            raise StaleArtifactError(
                f"the cache was made for TensorRT {version_text(self.version)}; TensorRT {version_text(number)} ignores it",
                where=where,
                remedy=f"write the cache for {version_text(number)}: the scales are the same, the first line is not",
            )
        if algorithm is not None and algorithm != self.algorithm:
            raise StaleArtifactError(
                f"the cache was made by {self.algorithm}; a calibrator for {algorithm} ignores it",
                where=where,
                remedy="use the calibrator of that algorithm, or make the cache again",
            )

    def for_version(self, version: str, algorithm: str | None = None) -> CalibrationCache:
        """The same scales with another first line."""
        return CalibrationCache(version_number(version), algorithm or self.algorithm, self.scales, self.left_out)

    def check_names(self, known: Iterable[str], *, where: str = "calibration cache") -> list[str]:
        """Make sure that the cache speaks of this network.

        Args:
            known: Names of the network's tensors.
            where: Named in errors.

        Returns:
            The tensors of the network that have no scale (or scale 0): TensorRT leaves them in float and says so in its log.

        Raises:
            CalibrationError: A tensor of the cache is not in the network. Names that TensorRT makes up itself
                (``(Unnamed Layer* 64) [Shuffle]_output``) are let through.
        """
        names = list(dict.fromkeys(known))
        present = set(names)
        unknown = [name for name in self.scales if name not in present and not _UNNAMED.match(name)]
        if unknown:
            raise CalibrationError(
                f"{len(unknown)} of {len(self)} tensors of the cache are not in the network: {some(unknown)}",
                where=where,
                remedy="use the cache with the network that it was made for; an export under other names needs a new one",
            )
        return [name for name in names if self.scales.get(name, 0.0) == 0.0]

    def describe(self) -> dict[str, Any]:
        """What the cache says in human terms, as JSON values: version, algorithm, and per tensor scale and range."""
        return {
            "kind": "TensorRT calibration cache",
            "tensorrt": version_text(self.version),
            "algorithm": self.algorithm,
            "tensors": [
                {
                    "name": name,
                    "bits": scale_bits(scale),
                    "scale": scale,
                    "low": -self.amax(name),
                    "high": self.amax(name),
                }
                for name, scale in self.scales.items()
            ],
            "unexcited": list(self.unexcited),
            "unnamed": sum(bool(_UNNAMED.match(name)) for name in self.scales),
        }

    def lines(self) -> Iterator[str]:
        """The same as text, one line a tensor, for a terminal."""
        yield f"calibration cache for TensorRT {version_text(self.version)}, {self.algorithm}, {len(self)} tensors"
        width = min(max((len(name) for name in self.scales), default=4), 60)
        yield f"{'tensor':{width}}  {'range':>25}  {'step':>12}  bits"
        for name, scale in self.scales.items():
            limit = self.amax(name)
            shown = f"{-limit:.6g} .. {limit:.6g}" if scale else "none: stays in float"
            yield f"{name:{width}}  {shown:>25}  {scale:12.6g}  {scale_bits(scale)}"


def _entry(line: str, where: str, *, zeros: bool) -> tuple[str, float]:
    name, separator, bits = line.rpartition(":")
    bits = bits.strip()
    if not separator or not name or not _HEX.fullmatch(bits):
        raise CalibrationError(
            f"this line is no entry of a calibration cache: {line[:80]!r}",
            where=where,
            remedy=f"entries read `tensor: hexadecimal`; {_REMAKE}",
        )
    scale = _scale_of(bits)
    if math.isnan(scale) or math.isinf(scale) or scale < 0 or (scale == 0 and not zeros):
        what = "NaN" if math.isnan(scale) else "infinite" if math.isinf(scale) else "negative" if scale < 0 else "zero"
        raise CalibrationError(
            f"the scale of {name!r} is {what} ({bits})",
            where=where,
            remedy="no image excited this tensor: calibrate with other images, or remove the line to leave it in float"
            if what == "zero"
            else f"the network or the calibration set holds values that are not finite, or the file is damaged; {_REMAKE}",
        )
    return name, scale + 0.0  # -0.0 is 0.0


def some(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
