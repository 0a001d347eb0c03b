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

The file says neither which network nor which images it belongs to, and TensorRT takes any. So every cache that is written here gets a
second file beside it, ``<name>.binding.json``, with the digests of the network, of the calibration set and of the cache itself.

When another version or another algorithm is asked for than the header says, TensorRT ignores the file and calibrates anew, without a
word. :meth:`CalibrationCache.check_reader` turns that into an error.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from zsq_deploy.artifact import atomic_writer, digest_bytes, digest_file, read_json, write_json
from zsq_deploy.errors import CalibrationError, StaleArtifactError, UsageError
from zsq_deploy.quant.ranges import Ranges

__all__ = [
    "ALGORITHMS",
    "CacheBinding",
    "CacheComparison",
    "CalibrationCache",
    "ScaleDifference",
    "binding_path",
    "check_binding",
    "compare_caches",
    "compare_scales",
    "read_cache",
    "scale_bits",
    "version_number",
    "version_text",
    "write_binding",
    "write_cache",
]

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "entropy-2": "EntropyCalibration2",
        "minmax": "MinMaxCalibration",
        "legacy": "LegacyCalibration",
        "entropy": "EntropyCalibration",
    }
)
"""Names on the command line -> algorithms as the header of a cache spells them. The first one is TensorRT's recommended one."""

_SCHEMA = 1
_CODES = 127.0
_HEADER = re.compile(r"TRT-(\d{4,6})-([A-Za-z0-9]+)")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_UNNAMED = re.compile(r"\(Unnamed Layer\* \d+\) \[.+\]")
_REMAKE = "make the cache again: zsq deploy writes one for the version that you name"


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
                f"{len(missing)} tensors have no range: {_some(missing)}",
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
                f"{len(unknown)} of {len(self)} tensors of the cache are not in the network: {_some(unknown)}",
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# -- files --


@dataclass(frozen=True)
class CacheBinding:
    """What a cache belongs to.

    Attributes:
        model_digest: Digest of the network.
        set_digest: Digest of the calibration set; empty for ranges without images.
        method: How the ranges were found (``minmax``, ``tensorrt-entropy-2``, ...).
        source: Who computed the scales: ``zsq``, or ``TensorRT 10.3.0``.
    """

    model_digest: str
    set_digest: str
    method: str
    source: str = "zsq"

    def __post_init__(self) -> None:
        if not self.model_digest:
            raise UsageError(
                "a calibration cache has to be bound to a network, and its digest is empty",
                where="CacheBinding",
                remedy="give the digest of the model",
            )


def binding_path(cache: Path) -> Path:
    """Where the digests of a cache are kept: ``<name>.binding.json`` beside it."""
    return cache.with_name(cache.name + ".binding.json")


def write_binding(cache: Path, binding: CacheBinding) -> None:
    """Say what the cache in a file belongs to."""
    write_json(
        binding_path(cache),
        {
            "schema_version": _SCHEMA,
            "model_digest": binding.model_digest,
            "set_digest": binding.set_digest,
            "method": binding.method,
            "source": binding.source,
            "cache_sha256": digest_file(cache),
        },
    )


def check_binding(cache: Path, *, model_digest: str, set_digest: str | None = None) -> CacheBinding:
    """Refuse a cache that belongs to something else.

    Args:
        cache: The cache file.
        model_digest: The network that it is wanted for.
        set_digest: The calibration set that it must come from; ``None`` accepts any.

    Returns:
        What the cache belongs to.

    Raises:
        StaleArtifactError: There is no binding, it names another network or set, or the cache was changed after it was written.
    """
    remedy = "remove the cache and its binding, so that it is made anew"
    beside = binding_path(cache)
    if not beside.is_file():
        raise StaleArtifactError(
            "this calibration cache does not say which network and images it belongs to",
            where=str(cache),
            remedy=f"{remedy}; a cache that you trust can be bound with zsq_deploy.backends.tensorrt.cache.write_binding",
        )
    stored = read_json(beside)
    if not isinstance(stored, dict) or stored.get("schema_version") != _SCHEMA:
        raise StaleArtifactError(
            "the binding of this calibration cache is damaged or of another version", where=str(beside), remedy=remedy
        )
    for key, wanted, what in (
        ("model_digest", model_digest, "network"),
        ("set_digest", set_digest, "calibration set"),
    ):
        if wanted is not None and stored.get(key) != wanted:
            raise StaleArtifactError(
                f"this calibration cache belongs to another {what}: {str(stored.get(key))[:12]}, wanted is {wanted[:12]}",
                where=str(cache),
                remedy=remedy,
            )
    if stored.get("cache_sha256") != digest_file(cache):
        raise StaleArtifactError(
            "this calibration cache was changed after it was written", where=str(cache), remedy=remedy
        )
    return CacheBinding(
        str(stored["model_digest"]),
        str(stored.get("set_digest", "")),
        str(stored.get("method", "")),
        str(stored.get("source", "")),
    )


def write_cache(path: Path, cache: CalibrationCache | bytes, binding: CacheBinding) -> None:
    """Write a cache and its binding, each atomically; a reader between the two writes finds that they do not fit.

    Args:
        path: The cache file.
        cache: The cache, or the bytes that TensorRT handed over.
        binding: What it belongs to.
    """
    data = cache if isinstance(cache, bytes) else cache.to_bytes()
    with atomic_writer(Path(path)) as file:
        file.write(data)
    write_binding(Path(path), binding)


def read_cache(path: Path, *, zeros: bool = False) -> CalibrationCache:
    """Read a cache from a file, whoever made it; see :meth:`CalibrationCache.parse` for what is refused.

    Raises:
        CalibrationError: There is no such file, or it is no usable cache.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError("there is no such calibration cache", where=str(path), remedy="check the path")
    return CalibrationCache.parse(path.read_bytes(), where=str(path), zeros=zeros)


# -- comparison --


@dataclass(frozen=True)
class ScaleDifference:
    """One tensor in two caches.

    Attributes:
        name: Of the tensor.
        first: Its scale in the first cache.
        second: Its scale in the second one.
    """

    name: str
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """``second / first``; infinite where only the first is zero, 1 where both are."""
        if self.first == self.second:
            return 1.0
        return math.inf if self.first == 0.0 else self.second / self.first


@dataclass(frozen=True)
class CacheComparison:
    """Two caches, tensor by tensor.

    Attributes:
        headers: What the two are called; of caches their first lines, without ``TRT-``.
        tensors: What both hold, the largest differences (as a factor) first.
        only_first: What only the first one holds.
        only_second: What only the second one holds.
        inverse: Whether the second one looks as if it stored the inverse of the scale, a common mistake of hand-made caches.
    """

    headers: tuple[str, str]
    tensors: tuple[ScaleDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    inverse: bool

    @property
    def equal(self) -> bool:
        """Whether both say the same scales, bit for bit; the headers do not count."""
        return not (self.only_first or self.only_second) and all(t.first == t.second for t in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; a ratio that is infinite is ``None``."""
        return {
            "headers": list(self.headers),
            "equal": self.equal,
            "tensors": [
                {
                    "name": t.name,
                    "first": t.first,
                    "second": t.second,
                    "ratio": t.ratio if math.isfinite(t.ratio) else None,
                }
                for t in self.tensors
            ],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "inverse": self.inverse,
        }

    def lines(self, most: int | None = 20) -> Iterator[str]:
        """The same as text, the largest differences first.

        Args:
            most: Tensors to show; ``None``: all.
        """
        differing = [t for t in self.tensors if t.first != t.second]
        yield f"{self.headers[0]} against {self.headers[1]}: {len(self.tensors)} tensors in both, {len(differing)} differ"
        if self.inverse:
            yield "the scales are inverse to each other: one of the files holds 127/amax instead of amax/127"
        width = min(max((len(t.name) for t in differing[:most]), default=4), 60)
        for t in differing[:most]:
            yield f"{t.name:{width}}  amax {127 * t.first:12.6g}  {127 * t.second:12.6g}  x {t.ratio:.4g}"
        if most is not None and len(differing) > most:
            yield f"... and {len(differing) - most} more"
        for title, names in (("only in the first", self.only_first), ("only in the second", self.only_second)):
            if names:
                yield f"{title} ({len(names)}): {_some(list(names))}"


def compare_caches(first: CalibrationCache, second: CalibrationCache) -> CacheComparison:
    """Two caches, tensor by tensor."""
    headers = f"{first.version}-{first.algorithm}", f"{second.version}-{second.algorithm}"
    return compare_scales(first.scales, second.scales, headers)


def compare_scales(
    first: Mapping[str, float], second: Mapping[str, float], headers: tuple[str, str]
) -> CacheComparison:
    """Two sets of scales by tensor name, wherever they come from.

    Args:
        first: Tensor name to scale (amax / 127).
        second: The same.
        headers: What the two are called.
    """
    shared = [ScaleDifference(name, s, second[name]) for name, s in first.items() if name in second]
    shared.sort(key=lambda t: -_distance(t.ratio))
    both = [t for t in shared if t.first > 0 and t.second > 0]
    return CacheComparison(
        headers,
        tuple(shared),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
        len(both) > 1
        and any(t.first != t.second for t in both)
        and all(abs(math.log(t.first * t.second)) < 1e-3 for t in both),
    )


def _distance(ratio: float) -> float:
    return math.inf if ratio <= 0.0 or math.isinf(ratio) else abs(math.log(ratio))
