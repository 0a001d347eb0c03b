"""Step sizes over time, and when to stop. Small state machines whose state goes into a checkpoint as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Constant", "EarlyStop", "Exponential", "Plateau", "Schedule", "ScheduleState"]


@dataclass
class ScheduleState:
    """Where a schedule (or a stopping rule) is."""

    best: float = math.inf
    waited: int = 0
    factor: float = 1.0
    smooth: float = math.nan

    def pack(self) -> list[float]:
        """The state as plain numbers."""
        return [self.best, float(self.waited), self.factor, self.smooth]

    @classmethod
    def unpack(cls, numbers: list[float]) -> ScheduleState:
        """The inverse of :meth:`pack`."""
        best, waited, factor, smooth = numbers
        return cls(best, int(waited), factor, smooth)


class Schedule(Protocol):
    """Step size as a function of the steps done and the losses seen."""

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size to use after step `step` (counted from 1) ended with `loss`."""


@dataclass(frozen=True)
class Constant:
    """The same step size throughout."""

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The base step size."""
        del step, loss, state
        return base


@dataclass(frozen=True)
class Plateau:
    """Divide the step size when the loss has not improved for `patience` steps (ZeroQ, Genie, IntraQ, DSG).

    A loss counts as better when it is below ``best * (1 - threshold)``.
    """

    patience: int = 100
    factor: float = 0.1
    minimum: float = 1e-4
    threshold: float = 1e-4

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size after another loss was seen."""
        del step
        if loss < state.best * (1 - self.threshold):
            state.best, state.waited = loss, 0
        else:
            state.waited += 1
        if state.waited > self.patience:
            state.factor, state.waited = state.factor * self.factor, 0
        return max(base * state.factor, min(base, self.minimum))


@dataclass(frozen=True)
class Exponential:
    """Multiply the step size by `factor` every `every` steps (Genie's generator: 0.95 every 100)."""

    factor: float = 0.95
    every: int = 100

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size after `step` steps."""
        del loss, state
        return float(base * self.factor ** (step // self.every))


@dataclass(frozen=True)
class EarlyStop:
    """Stop when the smoothed loss has not fallen by `threshold` (relative) for `patience` steps.

    The loss of one step is noisy, so an exponential average (weight `weight` for the newest) is what must fall.
    """

    patience: int = 50
    threshold: float = 0.01
    weight: float = 0.1

    def done(self, loss: float, state: ScheduleState) -> bool:
        """Whether to stop after another loss was seen."""
        state.smooth = loss if math.isnan(state.smooth) else (1 - self.weight) * state.smooth + self.weight * loss
        if state.smooth < state.best * (1 - self.threshold):
            state.best, state.waited = state.smooth, 0
        else:
            state.waited += 1
        return state.waited >= self.patience
