"""Methods of several stages, what is prepared once, and what batches leave to later ones: handed on, kept, and gone on from exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq_deploy.calib import running, synthesis
from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.calib.methods import METHODS, Method
from zsq_deploy.calib.parts.augment import Jitter
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import Pixels, Start, pixels
from zsq_deploy.calib.parts.recipe import Finished, Group, Preparation, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.terms import Context, CrossEntropy, Look
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, InterruptedRunError, StaleArtifactError
from zsq_deploy.model import Model

CLASSES, IMAGES, BATCH = 4, 5, 3
STEPS = (4, 3)
# One batch of a class each, then 5 images in two batches.
TOTAL = STEPS[0] * 2 + STEPS[1] * 2


@dataclass
class Diary:
    """What the method saw."""

    prepared: list[int] = field(default_factory=list)
    previous: list[Sequence[Mapping[str, Tensor]]] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    memories: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Toward:
    """Pulls the images to what was prepared, and to the mean of what earlier batches made."""

    note: Callable[[int, dict[str, Tensor]], None]
    name: str = "toward"
    weight: float = 0.5
    separable: bool = False
    needs_labels: bool = False

    def bind(self, context: Context) -> _Bound:
        return _Bound(self, context.prepared["aim"])


@dataclass(frozen=True)
class _Bound:
    term: Toward
    aim: Tensor
    fetch: Sequence[str] = ()

    def __call__(self, look: Look) -> Tensor:
        batch = int(look.memory["count"]) if "count" in look.memory else 0
        self.term.note(batch, dict(look.memory))
        aim = self.aim + look.memory["sum"] / look.memory["count"] if batch else self.aim
        return (look.images.mean((2, 3)) - aim).square().mean()


def method(diary: Diary) -> Method:
    """Centres first, one image a class; then images that start near them."""

    def prepare_first(preparation: Preparation) -> Mapping[str, Tensor]:
        diary.prepared.append(0)
        diary.previous.append(preparation.previous)
        random = batch_generator(preparation.context.seed, "aim", 0)
        return {"aim": torch.randn(3, generator=random)}

    def prepare_second(preparation: Preparation) -> Mapping[str, Tensor]:
        diary.prepared.append(1)
        diary.previous.append([dict(batch) for batch in preparation.previous])
        return {"aim": torch.cat([batch["parameters.pixels"] for batch in preparation.previous]).mean((0, 2, 3))}

    def remember(finished: Finished) -> Mapping[str, Tensor]:
        before = finished.memory
        mean = finished.images.mean((0, 2, 3))
        total = before["sum"] + mean if "sum" in before else mean
        count = before["count"] + 1 if "count" in before else torch.ones(())
        return {"sum": total, "count": count}

    def near(start: Start) -> Pixels:
        diary.starts.append(start)
        made = pixels(start)
        if start.previous:
            with torch.no_grad():
                made.pixels.add_(start.previous["images"])
        return made

    def first(batch: int, memory: dict[str, Tensor]) -> None:
        diary.memories[(0, batch)] = memory

    def second(batch: int, memory: dict[str, Tensor]) -> None:
        diary.memories[(1, batch)] = memory

    def recipe(parameters: Mapping[str, Any]) -> tuple[Recipe, Recipe]:
        groups = {"images": Group(parameters["rate"], schedule=Plateau(2))}
        common = {"loss": BNLoss(), "groups": groups, "batch_size": 2, "remember": remember}
        return (
            Recipe(
                **common,
                parametrise=pixels,
                steps=STEPS[0],
                terms=(Toward(first), CrossEntropy()),
                targets=uniform,
                prepare=prepare_first,
                images=lambda _asked, labels: labels.classes if labels else 0,
            ),
            Recipe(
                **common,
                parametrise=near,
                steps=STEPS[1],
                terms=(Toward(second),),
                augment=(Jitter(2),),
                prepare=prepare_second,
            ),
        )

    return Method("two", "", "", needs_bn=True, defaults={"rate": 0.1}, run=recipe)


@contextmanager
def offered(diary: Diary) -> Iterator[None]:
    """The method among all others, inside the block."""
    table = MappingProxyType({**METHODS, "two": method(diary)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "METHODS", table)
        patch.setattr(running, "METHODS", table)
        yield


COMMON: dict[str, Any] = {"method": "two", "images": IMAGES, "batch_size": BATCH, "device": "cpu"}


@pytest.fixture(scope="module")
def whole(classifier: Callable[..., Model]) -> CalibrationSet:
    """What an undisturbed run makes."""
    with offered(Diary()):
        return synthesize(classifier(), **COMMON)


def test_what_is_handed_on(classifier: Callable[..., Model]) -> None:
    diary = Diary()
    with offered(diary):
        made = synthesize(classifier(), **COMMON)
    parameters = made.manifest.parameters
    assert len(made) == IMAGES
    assert parameters["outcome"]["batches"] == [3, 2]
    assert [stage["outcome"]["batches"] for stage in parameters["earlier_stages"]] == [[2, 2]]
    assert parameters["earlier_stages"][0]["outcome"]["steps"] == [4, 4]
    assert diary.prepared == [0, 1]
    first, second = diary.previous
    assert len(first) == 0
    assert [batch["images"].shape for batch in second] == [(2, 3, 12, 10)] * 2
    assert [batch["parameters.pixels"].shape for batch in second] == [(2, 3, 12, 10)] * 2
    # A batch of the same size gets what it left, another gets nothing.
    assert [bool(start.previous) for start in diary.starts] == [False, True]
    assert torch.equal(diary.starts[1].previous["images"], second[1]["images"])
    # Random numbers of the stages differ; and a stage begins with an empty memory.
    noise = [batch_generator(0, purpose, 0).initial_seed() for purpose in ("images", "stage 1/images")]
    assert noise[0] != noise[1]
    assert diary.starts[0].generator.initial_seed() == noise[1]
    assert set(diary.memories) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert diary.memories[(0, 0)] == diary.memories[(1, 0)] == {}
    torch.testing.assert_close(diary.memories[(0, 1)]["sum"], second[0]["images"].mean((0, 2, 3)))
    images = torch.tensor(made.arrays()["image"])
    torch.testing.assert_close(diary.memories[(1, 1)]["sum"], images[:3].mean((0, 2, 3)))


def test_same_seed_same_bits(classifier: Callable[..., Model], whole: CalibrationSet) -> None:
    with offered(Diary()):
        same, other = (synthesize(classifier(), seed=seed, **COMMON) for seed in (0, 2))
    assert same.digest == whole.digest != other.digest


def test_batches_of_a_method_that_remembers_build_on_each_other(classifier: Callable[..., Model]) -> None:
    """The first one is the same whatever follows; the second one sees it."""
    diary, longer = Diary(), Diary()
    common = {**COMMON, "batch_size": 2}
    with offered(diary):
        few = synthesize(classifier(), **{**common, "images": 2})
    with offered(longer):
        many = synthesize(classifier(), **{**common, "images": 6})
    assert np.array_equal(few.arrays()["image"], many.arrays()["image"][:2])
    assert set(longer.memories) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}


@settings(max_examples=10, deadline=None)
@given(at=st.integers(1, TOTAL))
def test_an_interrupted_run_goes_on_exactly(
    at: int,
    whole: CalibrationSet,
    classifier: Callable[..., Model],
    recorder: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, diary = tmp_path_factory.mktemp("state"), Diary()
    with offered(diary):
        with pytest.raises(InterruptedRunError, match="--resume"):
            synthesize(classifier(), workdir=folder, progress=recorder(at), **COMMON)
        again = recorder()
        resumed = synthesize(classifier(), workdir=folder, resume=True, progress=again, **COMMON)
    assert resumed.digest == whole.digest
    assert resumed.manifest.parameters == whole.manifest.parameters
    assert len(again.values) == TOTAL - at  # no step was made twice
    assert diary.prepared == [0, 1]  # and nothing prepared twice
    assert not list(folder.glob("**/*.safetensors"))


@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(1, TOTAL // 2), min_size=2, max_size=4))
def test_interrupted_again_and_again(
    cuts: list[int],
    whole: CalibrationSet,
    classifier: Callable[..., Model],
    recorder: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, left = tmp_path_factory.mktemp("state"), TOTAL
    with offered(Diary()):
        for cut in cuts:
            if cut <= left:
                with pytest.raises(InterruptedRunError):
                    synthesize(classifier(), workdir=folder, resume=True, progress=recorder(cut), **COMMON)
                left -= cut
        resumed = synthesize(classifier(), workdir=folder, resume=True, **COMMON)
    assert resumed.digest == whole.digest


def test_a_state_of_another_run_is_refused(
    classifier: Callable[..., Model], whole: CalibrationSet, recorder: Any, tmp_path: Path
) -> None:
    with offered(Diary()):
        with pytest.raises(InterruptedRunError):  # in the second stage
            synthesize(classifier(), workdir=tmp_path, progress=recorder(TOTAL - 2), **COMMON)
        with pytest.raises(StaleArtifactError, match="rate"):
            synthesize(classifier(), workdir=tmp_path, resume=True, parameters={"rate": 0.2}, **COMMON)
        fresh = synthesize(classifier(), workdir=tmp_path, **COMMON)  # without resume it starts over
    assert fresh.digest == whole.digest


def test_one_stage_that_needs_classes_is_enough_to_be_refused(classifier: Callable[..., Model]) -> None:
    model = classifier(classes=1)  # one score is no class
    diary = Diary()
    with offered(diary), pytest.raises(CalibrationError, match="no class scores"):
        synthesize(model, **COMMON)
    assert diary.prepared == []
