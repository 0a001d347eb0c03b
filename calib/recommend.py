"""The rule behind ``--method auto``: from what was measured to a method and its budget.

1. the rows of the networks most like this one are taken: with or without batch norm (never mixed), and as far as there are rows also the same
   in being a classifier, in having depthwise layers and in the size of its images; only rows of the asked bits, and only of one protocol:
   that of deployed engines where there is one, else the one with most methods;
2. methods that this network cannot use, or that do not end within the time limit even at half of their steps, are left out;
3. a method's loss is its drop of accuracy against float (disagreement with float where there were no labels), averaged over the networks. Methods
   whose loss is within one standard error of the smallest are equals, as long as they also agree with float as often as the best of them
   does, within one standard error (agreement is the finer measure: it is paired, image by image);
4. of the equals the fastest is taken; times below a minute count as the same, and then the one that agrees more with float is taken.

Where nothing was measured, the default is used and the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from zsq_deploy.calib.catalogue import facts
from zsq_deploy.calib.evidence import Evidence, Kind, Row, kind_of, load_evidence
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.model import Model

__all__ = ["Candidate", "Recommendation", "recommend"]

_SAME_TIME = 60.0


@dataclass(frozen=True)
class Candidate:
    """A method that was weighed: loss and agreement with their errors, averaged over networks, and the time it should take."""

    method: str
    loss: float
    error: float
    agreement: float
    agreement_error: float
    seconds: float | None
    parameters: Mapping[str, Any]
    networks: int


@dataclass(frozen=True)
class Recommendation:
    """What the rule chose.

    Attributes:
        method: The method.
        parameters: Its parameters, where they differ from the defaults.
        images: Number of images.
        expected_seconds: Time that it should take on one core like that of the table; ``None`` if it was never measured.
        reasons: Why, one sentence each.
        candidates: What was weighed, the best first.
    """

    method: str
    parameters: Mapping[str, Any]
    images: int
    expected_seconds: float | None
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``calibration.recommendation`` of the report."""
        return {
            "method": self.method,
            "parameters": dict(self.parameters),
            "images": self.images,
            "expected_seconds": self.expected_seconds,
            "reasons": list(self.reasons),
            "candidates": [{**asdict(each), "parameters": dict(each.parameters)} for each in self.candidates],
        }


def _usable(model: Model, kind: Kind, name: str) -> bool:
    """Whether a method can make images for this network."""
    method = METHODS.get(name)
    if method is None or not method.images:
        return False
    known = facts(method)
    if known.needs_bn and not kind.batch_norm:
        return False
    if known.needs_labels and not kind.classifier:
        return False
    if known.steps:
        return len(model.inputs) == 1 and model.inputs[0].dtype.kind == "f" and len(model.inputs[0].shape) == 4
    return True


def _alike(kind: Kind, rows: Sequence[Row], bits: str) -> tuple[list[Row], str]:
    """The rows of the networks most like this one, and what was given up to find any."""
    rows = [row for row in rows if bits in row.results and row.kind.batch_norm == kind.batch_norm]
    same: list[tuple[str, Callable[[Kind], object]]] = [
        ("being a classifier or not", lambda k: k.classifier),
        ("depthwise layers", lambda k: k.depthwise),
        ("the size of the images", lambda k: k.large),
    ]
    for given_up in range(len(same) + 1):
        kept, lost = same[: len(same) - given_up], same[len(same) - given_up :]
        found = [row for row in rows if all(look(row.kind) == look(kind) for _, look in kept)]
        if found:
            return found, ", ".join(name for name, _ in lost)
    return [], ""


def _one_protocol(rows: Sequence[Row]) -> list[Row]:
    """The rows of one protocol: of engines before simulations, then that with most methods, most rows, the first by name."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.protocol, []).append(row)

    def order(name: str) -> tuple[bool, int, int, str]:
        own = by_name[name]
        return (not any(row.engines for row in own), -len({row.method for row in own}), -len(own), name)

    return by_name[min(by_name, key=order)]


def _time(rows: Sequence[Row], everything: Sequence[Row], name: str, kind: Kind, images: int) -> float | None:
    """Expected seconds for so many images, scaled from the measured network that is nearest in arithmetic (in pixels, for what is drawn)."""
    optimises = name in METHODS and METHODS[name].run is not None

    def size(of: Kind) -> int:
        return max(of.macs if optimises else of.pixels, 1)

    for table in (rows, everything):
        found = [row for row in table if row.method == name and row.seconds is not None and row.images]
        if found:
            near = min(found, key=lambda row: abs(math.log(size(row.kind) / size(kind))))
            return images * (near.seconds or 0.0) / near.images * size(kind) / size(near.kind)
    return None


def _fitted(candidate: Candidate, limit: float) -> Candidate | None:
    """The candidate with as many steps as the time allows, at least half of them; ``None`` if that is not enough."""
    if candidate.seconds is None or candidate.seconds <= limit:
        return candidate
    defaults = METHODS[candidate.method].defaults
    steps = candidate.parameters.get("steps", defaults.get("steps"))
    if METHODS[candidate.method].run is None or steps is None or 2 * limit < candidate.seconds:
        return None
    fewer = int(steps * limit / candidate.seconds)
    return replace(
        candidate, seconds=candidate.seconds * fewer / steps, parameters={**candidate.parameters, "steps": fewer}
    )


def _weigh(rows: Sequence[Row], everything: Sequence[Row], bits: str, kind: Kind, images: int) -> list[Candidate]:
    """Every method's loss over the networks that all have in common with the most measured one; the best first."""
    labelled = [row for row in rows if row.results[bits].drop is not None]
    rows = labelled or list(rows)
    most = max(len({row.network for row in rows if row.method == name}) for name in {row.method for row in rows})
    found = []
    for name in sorted({row.method for row in rows}):
        own = [row for row in rows if row.method == name]
        if len({row.network for row in own}) < most:
            continue  # measured on fewer networks: its mean would not compare
        results = [row.results[bits] for row in own]
        count = len(results)
        found.append(
            Candidate(
                name,
                sum(result.loss for result in results) / count,
                math.sqrt(sum(result.error**2 for result in results)) / count,
                sum(result.agreement for result in results) / count,
                math.sqrt(sum(result.agreement_error**2 for result in results)) / count,
                _time(own, everything, name, kind, images),
                dict(own[0].parameters),
                count,
            )
        )
    return sorted(found, key=lambda each: each.loss)


def recommend(
    model: Model,
    *,
    bits: str = "w8a8",
    images: int = 256,
    time_limit: float | None = None,
    evidence: Evidence | None = None,
    default: str = "zeroq",
) -> Recommendation:
    """Choose a method and its budget from what was measured.

    Args:
        model: The network.
        bits: Bits of weights and activations, ``w8a8``.
        images: Number of images that is wanted.
        time_limit: Seconds that synthesis may take, on one core like that of the table; ``None``: any.
        evidence: The table; ``None``: the one that comes with this program.
        default: What is used where nothing was measured and the network can use it.
    """
    bits, everything = bits.lower(), (evidence or load_evidence()).rows
    kind = kind_of(model)
    usable = [row for row in everything if _usable(model, kind, row.method)]
    rows, given_up = _alike(kind, _telling(usable, bits), bits)
    if not rows:
        chosen = default if _usable(model, kind, default) else "fractal"
        if not _usable(model, kind, chosen) or any(len(spec.shape) != 4 for spec in model.inputs):
            chosen = "gaussian"
        return Recommendation(
            chosen,
            {},
            images,
            None,
            (f"nothing has been measured in {bits} on networks with {kind.text()}: {chosen} is the default there",),
        )
    rows = _one_protocol(rows)
    failing = _failing(everything, rows[0], bits)
    kept = [row for row in rows if row.method not in failing]
    rows = kept or rows
    weighed = _weigh(rows, everything, bits, kind, images)
    reasons = [
        f"measured in {bits} on {', '.join(dict.fromkeys(row.network for row in rows))} ({rows[0].protocol}); this network has {kind.text()}"
    ]
    if kept and failing:
        reasons.append(f"left out, for they fail on other networks: {', '.join(sorted(failing))}")
    if given_up:
        reasons.append(f"no network was measured that is like this one in {given_up} as well")
    able = weighed
    if time_limit is not None:
        able = [fitted for each in weighed if (fitted := _fitted(each, time_limit)) is not None]
        late = [each.method for each in weighed if each.method not in {kept.method for kept in able}]
        if late:
            reasons.append(f"not within {time_limit:g} s: {', '.join(late)}")
    if not able:
        chosen = "fractal" if _usable(model, kind, "fractal") and kind.pixels else "gaussian"
        return Recommendation(chosen, {}, images, None, (*reasons, f"{chosen} needs no optimisation"), tuple(weighed))
    best = able[0]
    equals = [each for each in able if each.loss - best.loss <= math.hypot(each.error, best.error)]
    finest = max(equals, key=lambda each: each.agreement)
    equals = [
        each
        for each in equals
        if finest.agreement - each.agreement <= math.hypot(each.agreement_error, finest.agreement_error)
    ]

    def order(each: Candidate) -> tuple[float, float, str]:
        seconds = math.inf if each.seconds is None else each.seconds
        return (0.0 if seconds <= _SAME_TIME else seconds, -each.agreement, each.method)

    winner = min(equals, key=order)
    reasons.append(
        f"{winner.method} loses {100 * winner.loss:+.2f} points there (standard error {100 * winner.error:.2f}) and agrees with float on "
        f"{100 * winner.agreement:.1f} %"
    )
    others = [each for each in equals if each.method != winner.method]
    if others:
        reasons.append(
            "within the error of it: "
            + ", ".join(
                f"{each.method} ({100 * each.loss:+.2f}, {100 * each.agreement:.1f} %, {_spoken(each.seconds)})"
                for each in others
            )
            + f"; {winner.method} takes {_spoken(winner.seconds)}"
        )
    worse = [each for each in able if each not in equals]
    if worse:
        reasons.append(
            "worse: "
            + ", ".join(f"{each.method} ({100 * each.loss:+.2f}, {100 * each.agreement:.1f} %)" for each in worse)
        )
    if "steps" in winner.parameters and time_limit is not None:
        reasons.append(f"{winner.parameters['steps']} steps end within the time limit")
    return Recommendation(winner.method, winner.parameters, images, winner.seconds, tuple(reasons), tuple(weighed))


def _telling(rows: Sequence[Row], bits: str) -> list[Row]:
    """Without the networks on which no method leaves half of the answers as they were: in what is left, the order is chance."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if bits in row.results:
            place = row.network, row.protocol
            best[place] = max(best.get(place, 0.0), row.results[bits].agreement)
    return [row for row in rows if best.get((row.network, row.protocol), 1.0) >= 0.5]


def _failing(rows: Sequence[Row], like: Row, bits: str) -> set[str]:
    """Methods that fall behind the best one by more than 20 points of agreement on some network, measured like that row: not to be relied on elsewhere."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in _telling(rows, bits):
        if bits in row.results and row.engines == like.engines and row.kind.batch_norm == like.kind.batch_norm:
            places.setdefault((row.network, row.protocol), []).append(row)
    found: set[str] = set()
    for here in places.values():
        best = max(row.results[bits].agreement for row in here)
        found |= {row.method for row in here if best - row.results[bits].agreement > 0.2}
    return found


def _spoken(seconds: float | None) -> str:
    return "time unknown" if seconds is None else f"{seconds:.0f} s"
