"""The runtimes that engines are built for: one folder each, found by name, imported only when used.

A folder that holds a ``targets.py`` (with ``RUNTIME`` and ``TARGETS``, importing no runtime library) is a runtime; nothing has to be
registered. Its
module ``backend`` offers what :class:`Backend` says.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from zsq_deploy.backends.base import BuildSettings, Engine, KernelRecord, Runner, Target, ValidationData
from zsq_deploy.errors import UsageError

if TYPE_CHECKING:
    from zsq_deploy.progress import Progress

__all__ = [
    "TARGETS",
    "Backend",
    "BuildSettings",
    "Engine",
    "KernelRecord",
    "Runner",
    "Target",
    "ValidationData",
    "get_backend",
    "get_target",
    "target_names",
]


class Backend(Protocol):
    """What the module ``backend`` of a runtime offers.

    Attributes:
        QUANTIZERS: Who can quantize for it; ``auto`` is always one of them.
        CALIBRATORS: The runtime's own calibrators, as range methods (``ort-entropy``).
    """

    QUANTIZERS: tuple[str, ...]
    CALIBRATORS: tuple[str, ...]

    def options_from(self, settings: BuildSettings, target: Target) -> Any:
        """The runtime's build options for what a user asked for.

        Raises:
            UsageError: The runtime cannot do it.
        """

    def check_options(self, graph: Any, target: Target, options: Any) -> None:
        """Refuse, before any image is made, what would fail later: layers that the network does not have, tools that are missing.

        Raises:
            ZsqError: With what to do.
        """

    def build(
        self,
        model: Any,
        ranges: Any,
        target: Target,
        folder: Path,
        *,
        options: Any = ...,
        calibration: Any = ...,
        progress: Progress = ...,
    ) -> Engine:
        """Quantize a model for a target into a folder."""

    def runner(self, path: Path, target: Target, *, threads: int = ..., mode: Any = ...) -> Runner:
        """Load an engine (or a float model) with the session options of its target."""

    def integer_reference(self, engine: Engine, *, threads: int = ..., on_target: bool = ...) -> Any:
        """The engine's Q/DQ graph in exact integer arithmetic, with the runtime's own rounding (on this machine, or on the target)."""

    def float_modes(self, target: Target) -> Mapping[str, Mapping[str, Any]]:
        """The float modes that the device offers; the fastest is the fair baseline."""

    def device_facts(self, target: Target, *, threads: int = ...) -> Mapping[str, Any]:
        """What the runtime says of the device that it measures the target on, as JSON values for the report."""

    def missing_features(self, target: Target) -> tuple[str, ...]:
        """What this machine lacks to measure the target."""


@cache
def _all_targets() -> dict[str, Target]:
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            continue
        name = f"{__name__}.{module.name}.targets"
        try:
            targets = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                continue
            raise
        for target in targets.TARGETS:
            found[target.name] = target
    return found


class _Targets(Mapping[str, Target]):
    """All targets by name; the folders are looked through on first use, and no runtime is imported."""

    def __getitem__(self, name: str) -> Target:
        return _all_targets()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_all_targets())

    def __len__(self) -> int:
        return len(_all_targets())


TARGETS: Mapping[str, Target] = _Targets()


def target_names() -> tuple[str, ...]:
    """The names of all targets, in the order in which the runtimes list them."""
    return tuple(TARGETS)


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: There is none; the message says which ones there are and which one was probably meant.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = difflib.get_close_matches(name.lower(), target_names(), n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"there is no target {name!r}",
        where="--target",
        remedy=f"{meant}targets: {', '.join(target_names())}",
    )


def get_backend(target: Target | str) -> Backend:
    """The module ``backend`` of a target's runtime; this imports the runtime's library.

    Raises:
        UsageError: The target is not known, or the runtime's library is not installed.
    """
    if isinstance(target, str):
        target = get_target(target)
    try:
        module = importlib.import_module(f"{__name__}.{target.runtime}.backend")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"target {target.name!r} needs {error.name}, which is not installed",
            where="--target",
            remedy=f"install it: pip install 'zsq-deploy[{target.runtime}]'",
        ) from error
    return cast("Backend", module)
