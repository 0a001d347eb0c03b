"""What activations looked like, as values: moments and histograms that merge, give ranges, and are kept in a file.

They are made by :func:`zsq_deploy.quant.statistics.collect`. Variances of parts are joined with the update of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import atomic_writer
from zsq_deploy.errors import CalibrationError
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.scheme import Scheme
from zsq_deploy.quant.search import search

__all__ = ["Moments", "Statistics", "TensorStatistics"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, extremes, mean and variance of each channel (axis 1; everything is one channel below rank 2).

    Attributes:
        count: Numbers a channel.
        minimum: Smallest number of each channel.
        maximum: Largest number of each channel.
        mean: Mean of each channel.
        var: Population variance of each channel.
    """

    count: int
    minimum: Vector
    maximum: Vector
    mean: Vector
    var: Vector

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of numbers together."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(
            count,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.mean + delta * share,
            (self.var * self.count + other.var * other.count) / count + np.square(delta) * (self.count / count) * share,
        )


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What one activation looked like.

    Attributes:
        histogram: Of all of its numbers.
        channels: Per channel.
    """

    histogram: Histogram
    channels: Moments

    @property
    def count(self) -> int:
        """Number of numbers."""
        return self.histogram.total

    @property
    def minimum(self) -> float:
        """Smallest number."""
        return self.histogram.minimum

    @property
    def maximum(self) -> float:
        """Largest number."""
        return self.histogram.maximum

    @property
    def mean(self) -> float:
        """Mean of all numbers."""
        return float(self.channels.mean.mean())

    @property
    def var(self) -> float:
        """Population variance of all numbers."""
        return float((self.channels.var + np.square(self.channels.mean - self.channels.mean.mean())).mean())

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of numbers together."""
        return TensorStatistics(self.histogram.merge(other.histogram), self.channels.merge(other.channels))


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, TensorStatistics]):
    """What every activation looked like over a whole calibration set.

    Attributes:
        tensors: By value name, in the order of execution.
        images: Number of images.
        model_digest: Digest of the graph.
        set_digest: Digest of the calibration set; empty when the caller did not say.
    """

    tensors: Mapping[str, TensorStatistics]
    images: int
    model_digest: str = ""
    set_digest: str = ""

    def __getitem__(self, name: str) -> TensorStatistics:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def ranges(
        self,
        method: str = "minmax",
        *,
        bits: int = 8,
        symmetric: bool = False,
        percentile: float = 99.999,
        bins: int = 2048,
        scheme: Scheme | None = None,
    ) -> Ranges:
        """The range of every activation.

        Args:
            method: ``minmax``, ``percentile``, ``entropy`` or ``mse`` (:mod:`zsq_deploy.quant.search`).
            bits: Of the integers that will represent the activations.
            symmetric: Whether their zero point is fixed in the middle.
            percentile: Share of the numbers kept, in percent (``percentile`` only).
            bins: Resolution of the search (``entropy`` and ``mse``).
            scheme: The integers, instead of `bits` and `symmetric`.
        """
        kind = scheme or Scheme(bits=bits, signed=symmetric, symmetric=symmetric)
        values = {
            name: search(tensor.histogram, method, kind, percent=percentile, bins=bins)
            for name, tensor in self.tensors.items()
        }
        label = f"percentile {percentile:g}" if method == "percentile" else method
        return Ranges(values, label, self.model_digest, self.set_digest)

    def unexcited(self) -> list[tuple[str, list[int]]]:
        """Channels whose activation never changed, in any image at any place, by value name."""
        found: list[tuple[str, list[int]]] = []
        for name, tensor in self.tensors.items():
            still = np.flatnonzero(tensor.channels.minimum == tensor.channels.maximum)
            if len(still):
                found.append((name, [int(channel) for channel in still]))
        return found

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets together.

        Raises:
            CalibrationError: They belong to different networks or tensors.
        """
        if self.model_digest != other.model_digest or set(self.tensors) != set(other.tensors):
            raise CalibrationError(
                "these statistics belong to different networks or different tensors",
                where="Statistics.merge",
                remedy="collect both from the same network",
            )
        return Statistics(
            {name: tensor.merge(other.tensors[name]) for name, tensor in self.tensors.items()},
            self.images + other.images,
            self.model_digest,
            self.set_digest if self.set_digest == other.set_digest else "",
        )

    def save(self, path: Path) -> None:
        """Write one ``.npz`` file, atomically; nothing in it is pickled."""
        arrays: dict[str, Array] = {}
        index: list[dict[str, Any]] = []
        for number, (name, tensor) in enumerate(self.tensors.items()):
            h, c = tensor.histogram, tensor.channels
            index.append(
                {
                    "name": name,
                    "first": h.first,
                    "exponent": h.exponent,
                    "minimum": h.minimum,
                    "maximum": h.maximum,
                    "zeros": h.zeros,
                    "count": c.count,
                }
            )
            arrays[f"{number}.counts"] = h.counts
            arrays[f"{number}.channels"] = np.stack([c.minimum, c.maximum, c.mean, c.var])
        header = {
            "schema_version": _SCHEMA,
            "images": self.images,
            "model_digest": self.model_digest,
            "set_digest": self.set_digest,
            "tensors": index,
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        with atomic_writer(Path(path)) as file:
            file.write(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: The file is missing or is not a statistics file.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as data:
                header = json.loads(data["header"].tobytes())
                if header["schema_version"] != _SCHEMA:
                    raise ValueError(f"schema version {header['schema_version']}")
                tensors: dict[str, TensorStatistics] = {}
                for number, entry in enumerate(header["tensors"]):
                    low, high, mean, var = data[f"{number}.channels"]
                    tensors[entry["name"]] = TensorStatistics(
                        Histogram(
                            data[f"{number}.counts"],
                            int(entry["first"]),
                            int(entry["exponent"]),
                            float(entry["minimum"]),
                            float(entry["maximum"]),
                            int(entry["zeros"]),
                        ),
                        Moments(int(entry["count"]), low, high, mean, var),
                    )
                return cls(tensors, int(header["images"]), header["model_digest"], header["set_digest"])
        except Exception as error:
            raise CalibrationError(
                f"this is not a statistics file ({type(error).__name__}: {error})",
                where=str(path),
                remedy="collect the statistics again",
            ) from error
