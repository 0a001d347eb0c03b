"""KW, DSG, IntraQ, HAST, DeepInversion: their losses written down plainly, what sets each apart, and how they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.augment import blurred
from zsq_deploy.calib.parts.bn_loss import SLACK
from zsq_deploy.calib.parts.engine import Objective
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import NATURAL_MEAN, NATURAL_STD, InputSpace
from zsq_deploy.calib.parts.recipe import Preparation, Recipe, resolve
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.terms import Context
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, InterruptedRunError
from zsq_deploy.model import Model, Preprocess, Twin

NOISE = ("kw", "dsg", "intraq", "hast", "deepinversion")
QUICK: Mapping[str, Any] = MappingProxyType({"steps": 8})
NORMALISED = Preprocess(mean=NATURAL_MEAN, std=NATURAL_STD)
SPACE = InputSpace(None, None, None, None, None, None)
# Everything that a paper has, switched on.
FULL: Mapping[str, Mapping[str, Any]] = {
    "kw": {"label_weight": 0.7, "smooth_weight": 0.4, "jitter": 0.2},
    "dsg": {"label_weight": 2.0, "smooth_weight": 0.01, "size_weight": 0.01, "variety_weight": 0.3},
    "intraq": {"crop": 1.0, "lower": 0.3, "upper": 0.4, "soft": 0.3},
    "hast": {"crop": 1.0},
    "deepinversion": {"bn_weight": 0.5, "relative": False},
}


# --- the losses, as one would write them down -------------------------------------------------------------------------------------------


def forward(model: Model, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """What enters each batch norm, the features and the class scores."""

    def constant(name: str) -> Tensor:
        return torch.from_numpy(np.array(model.graph.constant(name))).to(x)

    inputs = []
    for number, stride in ((0, 2), (1, 1)):
        x = F.conv2d(x, constant(f"w{number}"), stride=stride, padding=1)
        inputs.append(x)
        parts = [constant(f"{kind}{number}") for kind in "mvgb"]
        x = F.relu(F.batch_norm(x, *parts))
    features = x.mean((2, 3))
    return inputs, features, features @ constant("head")


def changed(method: str, x: Tensor, plans: list[Mapping[str, Tensor]]) -> Tensor:
    """Augmentation by torch's own operators, image by image."""
    made = []
    for index, image in enumerate(x):
        out = image[None]
        for plan in plans:
            if "shift" in plan:
                out = torch.roll(out, plan["shift"][index].tolist(), (2, 3))
            if "box" in plan and bool(plan["cropped"][index]):
                top, left, tall, wide = plan["box"][index].tolist()
                out = out[:, :, top : top + tall, left : left + wide]
                out = F.interpolate(out, x.shape[2:], mode="bilinear", align_corners=False)
            if bool(plan.get("mirror", torch.zeros(len(x)))[index]) and bool(
                plan.get("cropped", torch.ones(len(x)))[index]
            ):
                out = out.flip(3)
        made.append(out)
    return torch.cat(made)


def plain(
    method: str, model: Model, x: Tensor, scene: Any, prepared: Mapping[str, Tensor], memory: Mapping[str, Tensor]
) -> Tensor:
    """The method's loss with :data:`FULL`, from its paper."""
    options = {**METHODS[method].defaults, **FULL[method]}
    seen = changed(method, x, list(scene.plans))
    inputs, features, scores = forward(model, seen)
    stored = [
        tuple(torch.from_numpy(np.array(model.graph.constant(f"{kind}{n}"))).to(x) for kind in "mv") for n in range(2)
    ]
    classes = scene.targets.classes
    entropy = F.cross_entropy(scores, classes, reduction="none")
    own = torch.softmax(scores, 1).gather(1, classes[:, None])[:, 0]
    moments = [(z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)) for z in inputs]
    tv = sum(
        torch.linalg.vector_norm(d)
        for d in (
            seen[..., 1:, :] - seen[..., :-1, :],
            seen[..., 1:] - seen[..., :-1],
            seen[..., 1:, 1:] - seen[..., :-1, :-1],
            seen[..., 1:, :-1] - seen[..., :-1, 1:],
        )
    )
    norms = seen.flatten(1).norm(dim=1).mean()
    if method == "kw":
        divergence = torch.stack(
            [
                (0.5 * (((v + 1e-5) / (var + 1e-5)).log() + (var + 1e-5 + (mean - m) ** 2) / (v + 1e-5) - 1)).mean()
                for (mean, var), (m, v) in zip(moments, stored, strict=True)
            ]
        ).mean()
        smooth = (x - blurred(x, options["sigma"])).square().mean()
        return divergence + options["label_weight"] * entropy.mean() + options["smooth_weight"] * smooth
    if method == "dsg":
        total = torch.zeros((), dtype=x.dtype)
        for layer, (z, (m, v)) in enumerate(zip(inputs, stored, strict=True)):
            slack = prepared[SLACK][layer].to(x)
            gaps = (z.mean((2, 3)) - m, (z.var((2, 3)) + 1e-6).sqrt() - (v + 1e-6).sqrt())
            twice = torch.tensor([2.0 if i % 2 == layer else 1.0 for i in range(len(x))]).to(x)[:, None]
            for gap, limit in zip(gaps, slack, strict=True):
                total = total + (twice * (gap.abs() - limit).clamp_min(0).square()).sum() / len(x)
        prior = x.mean((2, 3)).square().sum() + ((x.var((2, 3)) + 1e-6).sqrt() - 1).square().sum()
        rows = F.normalize(x.flatten(1), dim=1)
        random = batch_generator(0, "spectrum", 0)
        draws = [F.normalize(torch.randn(x.shape, generator=random).flatten(1), dim=1) for _ in range(4)]
        noise = torch.stack([torch.linalg.eigvalsh(d @ d.T) for d in draws]).mean(0).to(x)
        variety = (torch.linalg.eigvalsh(rows @ rows.T) - noise).square().mean()
        return total + prior / len(x) + 2 * entropy.mean() + 0.01 * tv + 0.01 * norms + 0.3 * variety
    if method in ("intraq", "hast"):
        matched = sum(
            (mean - m).square().mean() + (var - v).square().mean()
            for (mean, var), (m, v) in zip(moments, stored, strict=True)
        )
        if method == "hast":
            return matched / 2 + options["label_weight"] * ((1 - own) ** options["focus"] * entropy).mean()
        asked = scene.targets.soft.gather(1, classes[:, None])[:, 0].to(x)
        known = memory["feature_count"][classes] > 0
        centres = memory["feature_sum"][classes] / memory["feature_count"][classes].clamp_min(1)[:, None]
        distance = 1 - (features * centres.to(x)).sum(1) / features.norm(dim=1) / centres.to(x).norm(dim=1).clamp_min(
            1e-9
        )
        hinges = (0.3 - distance).clamp_min(0) + (distance - 0.4).clamp_min(0)
        return matched / 2 + (own - asked).square().mean() + hinges[known].mean()
    matched = torch.zeros((), dtype=x.dtype)
    for layer, ((mean, var), (m, v)) in enumerate(zip(moments, stored, strict=True)):
        matched = matched + (10 if layer == 0 else 1) * ((mean - m).norm() + (var - v).norm())
    weights = [options[f"{name}_weight"] for name in ("bn", "label", "smooth", "size")]
    return sum(w * p for w, p in zip(weights, (matched, entropy.mean(), tv, norms), strict=True))


def context_of(model: Model, recipe: Recipe, dtype: torch.dtype) -> Context:
    context = Context(
        model=model,
        network=prepare(model),
        spec=model.inputs[0],
        space=SPACE,
        labels=find_labels(model.graph, model.outputs),
        device=torch.device("cpu"),
        dtype=dtype,
    )
    if recipe.prepare is None:
        return context
    prepared = recipe.prepare(Preparation(context, 6, 6))
    return Context(**{**{name: getattr(context, name) for name in context.__dataclass_fields__}, "prepared": prepared})


def recipe_of(method: str, given: Mapping[str, Any]) -> Recipe:
    run = METHODS[method].run
    assert run is not None
    made = run(resolve(method, METHODS[method].defaults, {**given, "clip": False}))
    assert isinstance(made, Recipe)
    return made


@pytest.mark.parametrize("method", NOISE)
def test_loss_and_gradient_are_the_plain_ones(method: str, classifier: Callable[..., Model]) -> None:
    model, recipe = classifier(), recipe_of(method, FULL[method])
    memory = {
        "feature_sum": torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).double(),
        "feature_count": torch.tensor([2.0, 0.0, 1.0, 3.0]).double(),
    }
    x = torch.randn(6, 3, 12, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = F.interpolate(x[..., ::3, ::2], (12, 10), mode="bilinear")  # smooth, as images on their way are
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-3)):
        context = context_of(model, recipe, dtype)
        ours = Objective(
            recipe, context.network, context.spec, SPACE, device=context.device, dtype=dtype, context=context
        )
        scene = ours.rehearsal(tuple(x.shape))
        scene = type(scene)(**{**{k: getattr(scene, k) for k in scene.__dataclass_fields__}, "memory": memory})
        mine = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        value = ours.backward(mine, scene)["loss"]
        theirs = x.clone().requires_grad_()
        expected = plain(method, model, theirs, scene, context.prepared, memory)
        expected.backward()
        assert value == pytest.approx(float(expected.detach()), rel=tolerance)
        assert mine.grad is not None
        assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < tolerance


def test_slack_is_the_quantile_of_what_noise_does(classifier: Callable[..., Model]) -> None:
    model = classifier()
    recipe = recipe_of("dsg", {"noise": 20, "slack": 0.8})
    slack = context_of(model, recipe, torch.float64).prepared[SLACK]
    random = batch_generator(0, "slack", 0)
    noise = torch.cat([torch.randn(8, 3, 12, 10, generator=random) for _ in range(3)]).double()
    inputs, _, _ = forward(model, noise)
    for layer, z in enumerate(inputs):
        m, v = (np.array(model.graph.constant(f"{kind}{layer}")).astype(np.float64) for kind in "mv")
        values = z.numpy()
        gaps = np.abs(values.mean((2, 3)) - m), np.abs(np.sqrt(values.var((2, 3), ddof=1) + 1e-6) - np.sqrt(v + 1e-6))
        for side, gap in enumerate(gaps):
            assert float(slack[layer, side]) == pytest.approx(np.quantile(gap, 0.8), rel=1e-5)


# --- what sets each apart ---------------------------------------------------------------------------------------------------------------


def made(
    classifier: Callable[..., Model], method: str, images: int = 12, steps: int = 60, **parameters: Any
) -> CalibrationSet:
    stop = {"stop_patience": 0} if "stop_patience" in METHODS[method].defaults else {}
    given = {"steps": steps, **stop, **parameters}
    return synthesize(classifier(), method=method, images=images, batch_size=images, device="cpu", parameters=given)


def pixels(found: CalibrationSet) -> Tensor:
    return torch.tensor(found.arrays()["image"])


def certainty(classifier: Callable[..., Model], found: CalibrationSet) -> float:
    """Mean probability of the class that each image was asked to be."""
    _, _, scores = forward(classifier(), pixels(found))
    wanted = torch.tensor([label for batch in found.manifest.parameters["outcome"]["targets"] for label in batch])
    return float(torch.softmax(scores, 1).gather(1, wanted[: len(scores), None]).mean())


def test_kw_makes_smooth_images_of_a_class(classifier: Callable[..., Model]) -> None:
    def roughness(found: CalibrationSet) -> float:
        x = pixels(found)
        return float((x - blurred(x, 1.0)).square().mean())

    rough, smooth = (made(classifier, "kw", smooth_weight=weight) for weight in (0.0, 5.0))
    assert roughness(smooth) < 0.5 * roughness(rough)
    faint, asked = (certainty(classifier, made(classifier, "kw", label_weight=weight)) for weight in (0.01, 3.0))
    assert asked > faint + 0.15
    free = made(classifier, "kw", label_weight=0.0)
    assert "targets" not in free.manifest.parameters["outcome"]


def test_dsg_lets_statistics_differ_from_image_to_image(classifier: Callable[..., Model]) -> None:
    def spread(found: CalibrationSet) -> float:
        inputs, _, _ = forward(classifier(), pixels(found))
        return float(torch.stack([z.mean((2, 3)).std(0).mean() for z in inputs]).mean())

    tight, loose = made(classifier, "zeroq"), made(classifier, "dsg")
    assert spread(loose) > 1.5 * spread(tight)
    stressed, even = loose.digest, made(classifier, "dsg", emphasis=False).digest
    assert stressed != even
    wide, narrow = (
        made(classifier, "dsg", steps=20, slack=slack).manifest.parameters["outcome"] for slack in (0.9, 0.1)
    )
    assert wide["first"][0]["loss"] < narrow["first"][0]["loss"]


def test_dsg_with_labels_and_variety(classifier: Callable[..., Model]) -> None:
    faint, asked = (certainty(classifier, made(classifier, "dsg", label_weight=weight)) for weight in (0.001, 2.0))
    assert asked > faint + 0.15

    def alike(found: CalibrationSet) -> float:
        rows = F.normalize(pixels(found).flatten(1), dim=1)
        return float((rows @ rows.T - torch.eye(len(rows))).abs().mean())

    assert alike(made(classifier, "dsg", variety_weight=50.0)) < alike(made(classifier, "dsg"))


def test_intraq_keeps_its_distance_from_the_centre(classifier: Callable[..., Model]) -> None:
    def distances(**margins: float) -> float:
        """Mean distance of the second batch to the class centres of the first."""
        found = synthesize(
            classifier(), method="intraq", images=32, batch_size=16, device="cpu", parameters={"steps": 40, **margins}
        )
        _, features, _ = forward(classifier(), pixels(found))
        first, second = (torch.tensor(part) for part in found.manifest.parameters["outcome"]["targets"])
        apart = [
            1 - F.cosine_similarity(row, features[:16][first == label].mean(0), dim=0)
            for row, label in zip(features[16:], second, strict=True)
            if bool((first == label).any())
        ]
        return float(torch.stack(apart).mean())

    free, far = distances(lower=0.0, upper=2.0), distances(lower=0.6, upper=2.0, margin_weight=10.0)
    near = distances(lower=0.0, upper=0.01, margin_weight=10.0)
    assert near < free < far
    assert far > 0.4


def test_intraqs_soft_labels_are_not_reached_fully(classifier: Callable[..., Model]) -> None:
    weights = {"label_weight": 20.0, "crop": 0.0}
    full, soft = (certainty(classifier, made(classifier, "intraq", soft=low, **weights)) for low in (1.0, 0.2))
    assert soft < full - 0.05


def test_hast_leaves_images_hard(classifier: Callable[..., Model]) -> None:
    plainly, hard = (certainty(classifier, made(classifier, "hast", focus=focus)) for focus in (0.0, 4.0))
    assert hard < plainly


def test_deepinversion_sees_its_classes_in_smooth_images(classifier: Callable[..., Model]) -> None:
    def variation(found: CalibrationSet) -> float:
        x = pixels(found)
        return float((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean())

    found, faint = (made(classifier, "deepinversion", label_weight=weight) for weight in (3.0, 0.01))
    assert certainty(classifier, found) > certainty(classifier, faint) + 0.15
    assert variation(made(classifier, "deepinversion", smooth_weight=0.5)) < 0.7 * variation(found)


@pytest.mark.parametrize("method", ["intraq", "hast"])
def test_crops_have_an_effect(method: str, classifier: Callable[..., Model]) -> None:
    with_crops, without = (made(classifier, method, crop=share, steps=5).digest for share in (1.0, 0.0))
    assert with_crops != without


def test_all_differ(classifier: Callable[..., Model]) -> None:
    assert len({made(classifier, method, images=4, steps=5).digest for method in (*NOISE, "zeroq")}) == len(NOISE) + 1


# --- how they run -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NOISE)
@pytest.mark.parametrize(
    ("preprocess", "channels"), [(NORMALISED, 3), (Preprocess(raw_pixels=True), 3), (Preprocess(), 1)]
)
def test_the_loss_falls_and_images_are_valid(
    method: str, preprocess: Preprocess, channels: int, classifier: Callable[..., Model]
) -> None:
    model = classifier(preprocess, channels, (11, 18))
    found = synthesize(model, method=method, images=5, device="cpu", parameters={"steps": 60})
    images = found.arrays()["image"]
    assert images.shape == (5, channels, 11, 18)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    low, high = (np.asarray(side).reshape(1, -1, 1, 1) for side in preprocess.bounds(channels))
    assert (images >= low).all()
    assert (images <= high).all()
    outcome = found.manifest.parameters["outcome"]
    assert outcome["last"][0]["loss"] < 0.6 * outcome["first"][0]["loss"]
    json.dumps(found.manifest.parameters, allow_nan=False)


@pytest.mark.parametrize("method", NOISE)
def test_same_seed_same_bits_and_batches_of_their_own(method: str, classifier: Callable[..., Model]) -> None:
    common = {"method": method, "batch_size": 3, "device": "cpu", "parameters": QUICK}
    one, two, other = (synthesize(classifier(), images=6, seed=seed, **common) for seed in (3, 3, 4))
    assert one.digest == two.digest != other.digest
    few = synthesize(classifier(), images=3, seed=3, **common).arrays()["image"]
    assert np.array_equal(few, one.arrays()["image"][:3])


@settings(max_examples=10, deadline=None)
@given(at=st.integers(1, 16), method=st.sampled_from(NOISE))
def test_an_interrupted_run_goes_on_exactly(
    at: int,
    method: str,
    classifier: Callable[..., Model],
    recorder: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("state")
    full = {name: value for name, value in FULL[method].items() if name != "bn_weight"}
    parameters = {**QUICK, **full}
    common = {"method": method, "images": 6, "batch_size": 3, "parameters": parameters, "device": "cpu"}
    whole = synthesize(classifier(), **common)
    with pytest.raises(InterruptedRunError):
        synthesize(classifier(), workdir=folder, progress=recorder(at), **common)
    again = recorder()
    resumed = synthesize(classifier(), workdir=folder, resume=True, progress=again, **common)
    assert resumed.digest == whole.digest
    assert resumed.manifest.parameters == whole.manifest.parameters
    assert len(again.values) == 16 - at


@pytest.mark.parametrize("method", NOISE)
def test_networks_without_classes(method: str, classifier: Callable[..., Model]) -> None:
    model = classifier(classes=1)
    if method == "dsg":
        assert len(synthesize(model, method=method, images=2, device="cpu", parameters=QUICK)) == 2
        return
    with pytest.raises(CalibrationError, match="no class scores"):
        synthesize(model, method=method, images=2, device="cpu", parameters=QUICK)
    if method == "kw":
        without = {**QUICK, "label_weight": 0.0}
        assert len(synthesize(model, method=method, images=2, device="cpu", parameters=without)) == 2


@pytest.mark.parametrize("method", NOISE)
def test_a_network_with_one_batch_size(method: str, classifier: Callable[..., Model]) -> None:
    found = synthesize(classifier(batch=2), method=method, images=5, device="cpu", parameters=QUICK)
    assert len(found) == 5
    assert any("batches of 2 only" in note for note in found.manifest.notes) is (method != "dsg")


@pytest.mark.assets
def test_deepinversions_classes_are_reached_on_a_real_network(assets: Path) -> None:
    from zsq_deploy.model import load_model

    model = load_model(assets / "models" / "mlperf_tiny_resnet8_cifar10.onnx", preprocess=Preprocess(raw_pixels=True))
    found = synthesize(model, method="deepinversion", images=8, device="cpu", parameters={"steps": 60, "warmup": 6})
    images = next(iter(found.arrays().values()))
    scores = Twin(model.graph).run({model.inputs[0].name: torch.tensor(images)})[model.outputs[0].name]
    wanted = found.manifest.parameters["outcome"]["targets"][0]
    assert int((scores.argmax(1) == torch.tensor(wanted)).sum()) >= 7
