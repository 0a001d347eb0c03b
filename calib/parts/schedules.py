"""Step sizes over time, and when to stop. Small state machines whose state goes into a checkpoint as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Constant", "Cosine", "EarlyStop", "Exponential", "Milestones", "Plateau", "Schedule", "ScheduleState"]


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
        """The step size to use after `step` steps, the last of which had this `loss`.

        For the first step it is asked with 0 steps and a loss of minus infinity.
        """


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

    A loss counts as better when it is below ``best * (1 - threshold)``. With `reset`, the best loss is forgotten
    when the step size falls (Sony's data generation).
    """

    patience: int = 100
    factor: float = 0.1
    minimum: float = 1e-4
    threshold: float = 1e-4
    reset: bool = False

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size after another loss was seen."""
        del step
        if loss < state.best * (1 - self.threshold):
            state.best, state.waited = loss, 0
        else:
            state.waited += 1
        if state.waited > self.patience:
            state.factor, state.waited = state.factor * self.factor, 0
            if self.reset:
                state.best = math.inf
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
class Cosine:
    """Rise linearly for `warmup` steps, then fall to zero along half a cosine until `steps` (DeepInversion, PSAQ-ViT).

    Step k (counted from 0) of the rise has the factor (k + 1) / warmup, step k behind it (1 + cos(pi (k - warmup) / (steps - warmup))) / 2.
    """

    steps: int
    warmup: int = 0

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size of step `step`, counted from 0."""
        del loss, state
        if step < self.warmup:
            return base * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


@dataclass(frozen=True)
class Milestones:
    """Multiply the step size by `factor` after each of the given numbers of steps."""

    at: tuple[int, ...]
    factor: float = 0.1

    def after(self, step: int, loss: float, base: float, state: ScheduleState) -> float:
        """The step size after `step` steps."""
        del loss, state
        return float(base * self.factor ** sum(step >= at for at in self.at))


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
