"""Step sizes over time against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.parts.schedules import Cosine, Milestones, Schedule, ScheduleState


def rates(schedule: Schedule, steps: int, base: float = 0.3) -> list[float]:
    """The step size that each step is made with."""
    state = ScheduleState()
    found = [schedule.after(0, -math.inf, base, state)]
    for step in range(1, steps):
        found.append(schedule.after(step, 1.0, base, state))
        state = ScheduleState.unpack(state.pack())
    return found


def torchs(make: object, steps: int, base: float = 0.3) -> list[float]:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = make(optimiser)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


@settings(max_examples=20, deadline=None)
@given(at=st.lists(st.integers(1, 40), min_size=0, max_size=4, unique=True), factor=st.floats(0.05, 0.9))
def test_milestones_are_torchs(at: list[int], factor: float) -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, sorted(at), factor), 45)
    assert rates(Milestones(tuple(sorted(at)), factor), 45) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 60))
def test_cosine_is_torchs(steps: int) -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps), steps)
    assert rates(Cosine(steps), steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(warmup=st.integers(1, 20), rest=st.integers(1, 40))
def test_cosine_behind_a_rise_is_torchs(warmup: int, rest: int) -> None:
    def make(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        schedulers = torch.optim.lr_scheduler
        rise = schedulers.LambdaLR(optimiser, lambda step: (step + 1) / warmup)
        return schedulers.SequentialLR(optimiser, [rise, schedulers.CosineAnnealingLR(optimiser, rest)], [warmup])

    found = rates(Cosine(warmup + rest, warmup), warmup + rest)
    assert found == pytest.approx(torchs(make, warmup + rest), rel=1e-6, abs=1e-9)
    assert found[warmup - 1] == pytest.approx(0.3)
    assert max(found) == pytest.approx(0.3)


def test_cosine_stays_at_the_end_and_takes_any_warmup() -> None:
    assert Cosine(10).after(25, 0.0, 1.0, ScheduleState()) == pytest.approx(0)
    assert Cosine(3, warmup=5).after(2, 0.0, 1.0, ScheduleState()) == pytest.approx(0.6)
    assert Cosine(5, warmup=5).after(5, 0.0, 1.0, ScheduleState()) == pytest.approx(1.0)
