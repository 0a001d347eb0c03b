"""A synthesis paper as a value: what is optimised, towards what, with which steps, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.parametrisations import Parametrisation
from zsq_deploy.calib.parts.schedules import Constant, EarlyStop, Schedule
from zsq_deploy.errors import UsageError

__all__ = ["Group", "Recipe", "resolve"]


@dataclass(frozen=True)
class Group:
    """How Adam moves one group of parameters.

    Attributes:
        rate: Step size at the start.
        betas: Adam's two decay rates.
        schedule: How the step size goes on.
    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = field(default_factory=Constant)


@dataclass(frozen=True)
class Recipe:
    """One way to make images from a network.

    Attributes:
        loss: The batch-norm-statistics loss.
        parametrise: Makes the parameters of a batch from (shape, random generator, device).
        groups: Optimiser settings per parameter group.
        steps: Most steps per batch.
        batch_size: Images that are made together.
        stop: When to stop before `steps`; ``None``: never.
        clip: Keep images within the bounds of valid pixels.
        swing: Reach of swing convolution in pixels; 0: off.
        total_variation: Weight of the total variation of the images.
    """

    loss: BNLoss
    parametrise: Callable[[tuple[int, ...], torch.Generator, torch.device], Parametrisation]
    groups: Mapping[str, Group]
    steps: int
    batch_size: int
    stop: EarlyStop | None = None
    clip: bool = True
    swing: int = 0
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))


def resolve(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A method's parameters: its defaults, with what the user gave on top.

    Raises:
        UsageError: A name is unknown, or a value has the wrong type.
    """
    resolved = dict(defaults)
    for name, value in (given or {}).items():
        if name not in resolved:
            raise UsageError(
                f"method {method!r} has no parameter {name!r}",
                where=name,
                remedy=f"its parameters are {', '.join(sorted(resolved))}" if resolved else "it has no parameters",
            )
        resolved[name] = _cast(method, name, value, resolved[name])
    return resolved


def _cast(method: str, name: str, value: Any, default: Any) -> Any:
    wanted = type(default)
    ok = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not ok:
        raise UsageError(
            f"parameter {name!r} of method {method!r} has to be {wanted.__name__}, not {value!r}",
            where=name,
            remedy=f"the default is {default!r}",
        )
    return value


def describe(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe as plain values, for a manifest."""
    return {
        "loss": recipe.loss.as_parameters(),
        "groups": {
            name: {
                "rate": group.rate,
                "betas": list(group.betas),
                "schedule": {"kind": type(group.schedule).__name__.lower(), **_fields(group.schedule)},
            }
            for name, group in recipe.groups.items()
        },
        "early_stop": None if recipe.stop is None else _fields(recipe.stop),
    }


def _fields(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)
