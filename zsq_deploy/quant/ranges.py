"""The ranges of a network's activations, as a value: what a statistics pass hands to every vendor's writer.

Nothing in here knows a vendor's format; the backends write their own files from it. The two digests say which network and which
calibration set the ranges belong to, so that a stale file is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zsq_deploy.artifact import digest_json, read_json, write_json
from zsq_deploy.errors import CalibrationError, StaleArtifactError

__all__ = ["Ranges"]

_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Ranges(Mapping[str, tuple[float, float]]):
    """Value name to ``(low, high)``, finite, ``low <= high``, in the tensor's own unit.

    Attributes:
        values_by_name: The ranges; read-only.
        method: How they were found (``minmax``, ``mse``, ..., ``bn-analytic``), with what was changed afterwards.
        model_digest: Digest of the graph that they belong to; empty when unknown.
        set_digest: Digest of the calibration set; empty for ranges without images.
        notes: What a reader should know, one sentence each. Not part of the digest.
    """

    values_by_name: Mapping[str, tuple[float, float]]
    method: str
    model_digest: str = ""
    set_digest: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        clean: dict[str, tuple[float, float]] = {}
        for name, (low, high) in self.values_by_name.items():
            pair = (float(low), float(high))
            if not (math.isfinite(pair[0]) and math.isfinite(pair[1])) or pair[0] > pair[1]:
                raise CalibrationError(
                    f"the range of {name!r} is not usable: {pair[0]} .. {pair[1]}",
                    where=name,
                    remedy="look for NaN or infinite values in the network or in the calibration set",
                )
            clean[name] = pair
        object.__setattr__(self, "values_by_name", MappingProxyType(clean))

    def __getitem__(self, name: str) -> tuple[float, float]:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ranges, method and what they belong to; the order of the names does not matter."""
        return digest_json(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "schema_version": _SCHEMA,
            "method": self.method,
            "model_digest": self.model_digest,
            "set_digest": self.set_digest,
            "ranges": {name: list(pair) for name, pair in sorted(self.values_by_name.items())},
        }

    def replace(self, **changes: Any) -> Ranges:
        """A copy with other fields (``method``, ``model_digest``, ``set_digest``, ``notes``, ``values_by_name``)."""
        return dataclasses.replace(self, **changes)

    def bound(self, *, model_digest: str = "", set_digest: str = "") -> Ranges:
        """A copy that says which network and which calibration set it belongs to."""
        return dataclasses.replace(self, model_digest=model_digest, set_digest=set_digest)

    def updated(self, ranges: Mapping[str, tuple[float, float]], *, method: str | None = None) -> Ranges:
        """A copy with some ranges replaced or added."""
        return dataclasses.replace(self, values_by_name={**self.values_by_name, **ranges}, method=method or self.method)

    def to_json(self) -> dict[str, Any]:
        """Everything as a JSON value; floats keep all of their digits."""
        return {**self._content(), "notes": list(self.notes), "digest": self.digest}

    @classmethod
    def from_json(
        cls, content: Mapping[str, Any], *, model_digest: str | None = None, set_digest: str | None = None
    ) -> Ranges:
        """Read what :meth:`to_json` wrote.

        Args:
            content: The JSON value.
            model_digest: The network that the ranges are wanted for; ``None`` accepts any.
            set_digest: The calibration set that they must come from; ``None`` accepts any.

        Raises:
            CalibrationError: The content is not a ranges file, or was changed by hand.
            StaleArtifactError: It belongs to another network or another set.
        """
        try:
            if content["schema_version"] != _SCHEMA:
                raise CalibrationError(
                    f"this ranges file has schema version {content['schema_version']}, wanted is {_SCHEMA}",
                    where="ranges",
                    remedy="make it again with this version of zsq",
                )
            ranges = cls(
                {str(name): (float(low), float(high)) for name, (low, high) in content["ranges"].items()},
                str(content["method"]),
                str(content["model_digest"]),
                str(content["set_digest"]),
                tuple(str(note) for note in content.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"this is not a ranges file ({type(error).__name__}: {error})",
                where="ranges",
                remedy="make it again with the command that wrote it",
            ) from error
        if content.get("digest") != ranges.digest:
            raise CalibrationError(
                "the ranges file does not fit its own digest: it was changed after it was written",
                where="ranges",
                remedy="make it again with the command that wrote it",
            )
        ranges.check(model_digest=model_digest, set_digest=set_digest)
        return ranges

    def check(self, *, model_digest: str | None = None, set_digest: str | None = None) -> None:
        """Refuse ranges of another network or set.

        Raises:
            StaleArtifactError: A digest that both sides know differs.
        """
        for wanted, found, what in (
            (model_digest, self.model_digest, "network"),
            (set_digest, self.set_digest, "calibration set"),
        ):
            if wanted and found and wanted != found:
                raise StaleArtifactError(
                    f"these ranges belong to another {what}: {found[:12]}..., wanted is {wanted[:12]}...",
                    where="ranges",
                    remedy="collect the ranges again for this network and set",
                )

    def save(self, path: Path) -> None:
        """Write a JSON file, atomically."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path, *, model_digest: str | None = None, set_digest: str | None = None) -> Ranges:
        """Read a JSON file; see :meth:`from_json`."""
        content = read_json(Path(path))
        if not isinstance(content, dict):
            raise CalibrationError("this is not a ranges file", where=str(path), remedy="check the path")
        return cls.from_json(content, model_digest=model_digest, set_digest=set_digest)
