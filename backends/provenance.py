"""Whether ranges and images belong to the network that is quantized; the same question for every runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zsq_deploy.errors import StaleArtifactError, UsageError
from zsq_deploy.model.graph import Graph

__all__ = ["check_exclusions", "check_provenance"]


def check_exclusions(graph: Graph, names: Iterable[str]) -> None:
    """Refuse to exclude nodes that a network does not have.

    Raises:
        UsageError: Naming some of them.
    """
    unknown = [name for name in names if name not in graph]
    if unknown:
        raise UsageError(
            f"nodes to exclude are not in the network: {', '.join(unknown[:5])}",
            where="exclude",
            remedy="take the names from `zsq inspect`",
        )


def check_provenance(model: Any, folded: Graph, ranges: Any, calibration: Any) -> None:
    """Refuse ranges and images that were made from another network, or ranges of another set.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        folded: Its graph with batch norm folded.
        ranges: A :class:`~zsq_deploy.quant.Ranges`, any other mapping, a calibrator's name, or ``None``.
        calibration: The calibration set, or ``None``.

    Raises:
        StaleArtifactError: They do not belong together.
    """
    known = {model.digest, folded.digest}
    stated = str(getattr(ranges, "model_digest", "") or "")
    if stated and stated not in known:
        raise StaleArtifactError(
            "these ranges were measured on another network",
            where=f"ranges of model {stated[:12]}..., network {model.name} is {model.digest[:12]}...",
            remedy="collect the ranges again for this network",
        )
    if calibration is None:
        return
    manifest = getattr(calibration, "manifest", None)
    made_for = str(getattr(manifest, "model_digest", "") or "")
    if made_for and made_for not in known | {str(getattr(model, "origin", ""))}:
        raise StaleArtifactError(
            "this calibration set was synthesized from another network",
            where=f"set of model {made_for[:12]}..., network {model.name} is {model.digest[:12]}...",
            remedy="synthesize a set from this network (`zsq synth`)",
        )
    used = str(getattr(ranges, "set_digest", "") or "")
    if used and used != calibration.digest:
        raise StaleArtifactError(
            "the ranges were measured on another calibration set than the one given",
            where=f"ranges of set {used[:12]}..., given {calibration.digest[:12]}...",
            remedy="collect the ranges again on this set",
        )
