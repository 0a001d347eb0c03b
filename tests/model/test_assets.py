"""Real networks as exporters leave them, in their ONNX and torch forms: cleaned and folded, against ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from zsq_deploy.model import Model, load_model

pytestmark = pytest.mark.assets

FILES = {  # batch normalizations
    "dncnn25": 0,
    "mlperf_tiny_mobilenet_v1_025_vww": 27,
    "mlperf_tiny_resnet8_cifar10": 7,
    "mobilenet_v1_025_imagenet": 27,
    "resnet20_cifar10": 19,
    "squeezenet11_imagenet": 0,
    "ultraface_rfb320": 35,
    "vit_cifar10": 0,
}
TORCH = {
    "resnet20_cifar10": ("cifar_resnet:resnet20", (1, 3, 32, 32)),
    "vit_cifar10": ("vit:vit_cifar10", (1, 3, 32, 32)),
    "mobilenet_v1_025_imagenet": ("mobilenet:mobilenet_v1_025", (1, 3, 224, 224)),
    "squeezenet11_imagenet": ("squeezenet:squeezenet11", (1, 3, 224, 224)),
}
NOISE = {"Cast", "CastLike", "ConstantOfShape", "Constant", "Identity", "Mod", "Equal", "Where", "Unsqueeze"}


@cache
def load(assets: Path, name: str) -> Model:
    shape = (1, 1, 64, 64) if name == "dncnn25" else None
    return load_model(assets / "models" / f"{name}.onnx", input_shape=shape)


@cache
def load_torch(assets: Path, name: str) -> Model:
    spec, shape = TORCH[name]
    folder = assets / "models"
    return load_model(spec, path=folder, weights=folder / f"{name}.safetensors", input_shape=shape)


@pytest.mark.parametrize("name", FILES)
def test_cleaned_and_folded_files_compute_what_the_file_computes(assets, name, ort_run, relative_error, images):
    model = load(assets, name)
    assert model.dynamic_batch
    assert model.inputs[0].shape[0] is None
    assert 17 <= model.graph.opset <= 21
    feeds = images(model.graph, 3)
    single = [{key: value[index : index + 1] for key, value in feeds.items()} for index in range(3)]
    original = [ort_run(assets / "models" / f"{name}.onnx", item) for item in single]  # one by one: some fix the batch
    wanted = [np.concatenate(parts) for parts in zip(*original, strict=True)]
    for graph in (model.graph, model.folded().graph):
        for found, expected in zip(ort_run(graph, feeds), wanted, strict=True):
            assert relative_error(found, expected) < 1e-5
        for found, expected in zip(ort_run(graph, single[0]), original[0], strict=True):
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_files_keep_batch_norms_and_lose_noise(assets, name):
    model = load(assets, name)
    operators = Counter(node.op_type for node in model.graph)
    assert operators["BatchNormalization"] == FILES[name] == len(model.batch_norms())
    assert not NOISE & set(operators)
    # A class token is repeated for each sample; nothing else needs to know the batch size.
    assert operators["Shape"] == operators["Expand"] == (1 if name == "vit_cifar10" else 0)
    assert all(norm.conv is not None for norm in model.batch_norms())
    folded = model.folded()
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph)
    assert len(folded.batch_norms) == FILES[name]
    for layer, norm in folded.batch_norms.items():
        assert folded.graph.node(layer).output[0] == norm.output
        assert folded.graph.constant(f"{layer}.bias") is not None


@pytest.mark.parametrize("name", FILES)
def test_loading_twice_gives_one_digest(assets, name):
    first, second = load(assets, name), load.__wrapped__(assets, name)
    assert first.digest == second.digest
    assert first.folded().graph.digest == second.folded().graph.digest
    assert first.digest != first.folded().graph.digest or not FILES[name]


def test_names_of_the_file_are_kept(assets):
    model = load(assets, "mlperf_tiny_resnet8_cifar10")
    import onnx

    original = onnx.load(assets / "models" / "mlperf_tiny_resnet8_cifar10.onnx")
    assert [spec.name for spec in model.inputs] == ["image"]
    assert [spec.name for spec in model.outputs] == ["logits"]
    assert {t.name for t in original.graph.initializer} == set(model.graph.initializer_names)
    assert {name for n in original.graph.node for name in n.output} == {name for n in model.graph for name in n.output}


@pytest.mark.parametrize("name", TORCH)
def test_torch_form_equals_file_form(assets, name, ort_run, relative_error, images):
    model = load_torch(assets, name)
    feeds = next(iter(images(model.graph, 3).values()))
    (wanted,) = ort_run(assets / "models" / f"{name}.onnx", feeds)
    for graph in (model.graph, model.folded().graph):
        assert relative_error(ort_run(graph, feeds)[0], wanted) < 1e-5
    operators = Counter(node.op_type for node in model.graph)
    assert operators["BatchNormalization"] == FILES[name]
    assert not NOISE & set(operators)
    assert operators["Shape"] == (1 if name == "vit_cifar10" else 0)


def test_torch_form_is_named_after_its_modules_and_repeatable(assets):
    model, again = load_torch(assets, "resnet20_cifar10"), load_torch.__wrapped__(assets, "resnet20_cifar10")
    assert model.digest == again.digest
    assert "layer2.0.conv1/Conv" in model.graph
    assert model.graph.node("layer2.0.conv1/Conv").input[1] == "layer2.0.conv1.weight"
    assert model.graph.node("layer2.0.bn1/BatchNormalization").input[3] == "layer2.0.bn1.running_mean"
    assert model.name == "resnet20"
    assert [norm.conv for norm in model.batch_norms()][:2] == ["conv1/Conv", "layer1.0.conv1/Conv"]


def test_an_output_grows_with_the_batch_only(assets):
    model = load(assets, "ultraface_rfb320")
    assert [spec.shape for spec in model.outputs] == [(None, 4420, 2), (None, 4420, 4)]
    assert model.inputs[0].shape == (None, 3, 240, 320)
