"""Real networks through the whole job, against what an engine has to reach; latency is left out, it does not belong into tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.model import Preprocess, load_model
from zsq_deploy.pipeline import EngineSettings, Evidence, build_engine, make_images, measure_ranges, verify_engine

IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

CASES = {
    "resnet20_cifar10": (IMAGENET, "cifar10_test.npz", 400, None, 0.975),
    "mlperf_tiny_resnet8_cifar10": (Preprocess(raw_pixels=True), "cifar10_test.npz", 400, None, 0.955),
    "vit_cifar10": (
        Preprocess((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar10_test.npz",
        200,
        None,
        0.955,
    ),
    "mobilenet_v1_025_imagenet": (HALF, "imagenet_like_224", 100, None, 0.80),
    "mlperf_tiny_mobilenet_v1_025_vww": (Preprocess((0.0,) * 3, (1.0,) * 3), None, 0, None, 0.85),
    "ultraface_rfb320": (HALF, None, 0, None, None),
    "dncnn25": (Preprocess((0.0,), (1.0,)), None, 0, (1, 1, 48, 48), None),
}
"""Network: preprocessing, data, images, input shape, and least agreement with float (a few points below what was measured)."""


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("name", CASES)
def test_engine_of_a_real_network(name: str, assets: Path, tmp_path: Path) -> None:
    preprocess, data_name, count, input_shape, least = CASES[name]
    model = load_model(assets / "models" / f"{name}.onnx", preprocess=preprocess, input_shape=input_shape)
    images = make_images(model, method="fractal", images=24, holdout=16, seed=3)
    measured = measure_ranges(model, images, "auto")
    target = get_target("ort-x86-vnni")
    built = build_engine(model, images, measured, target, tmp_path / target.name, EngineSettings(search=False))
    data = load_eval_data(assets / "data" / data_name, model.inputs[0], limit=count) if data_name else None
    section = verify_engine(
        model, built.engine, Evidence(data, images.holdout), measured.observed, tmp_path, latency=False
    )

    assert section["integer"]["macs_share"] == 1.0
    assert section["parity"]["integer"]["equal_share"] >= 0.9999
    assert section["parity"]["within_2_lsb"] >= 0.995
    if section["parity"].get("top1_agreement") is not None:
        assert section["parity"]["top1_agreement"] >= 0.995
    accuracy = section["accuracy"]
    if least is not None:
        assert accuracy["agreement_with_float"]["engine"] >= least
    assert accuracy["estimate"] == (data is None)


@pytest.mark.assets
def test_torch_form_and_onnx_form_give_engines_that_agree(assets: Path, tmp_path: Path) -> None:
    torch_form = load_model(
        "cifar_resnet:resnet20",
        path=assets / "models",
        weights=assets / "models" / "resnet20_cifar10.safetensors",
        input_shape=(1, 3, 32, 32),
        preprocess=IMAGENET,
    )
    onnx_form = load_model(assets / "models" / "resnet20_cifar10.onnx", preprocess=IMAGENET)
    data = load_eval_data(assets / "data" / "cifar10_test.npz", onnx_form.inputs[0], limit=200)
    found = []
    for index, model in enumerate((torch_form, onnx_form)):
        images = make_images(model, method="fractal", images=24, holdout=8, seed=3)
        measured = measure_ranges(model, images, "auto")
        target = get_target("ort-x86-vnni")
        built = build_engine(model, images, measured, target, tmp_path / str(index), EngineSettings(search=False))
        section = verify_engine(
            model, built.engine, Evidence(data, images.holdout), measured.observed, tmp_path, latency=False
        )
        assert section["integer"]["macs_share"] == 1.0
        assert section["parity"]["integer"]["equal_share"] == 1.0
        found.append(section["accuracy"]["engine"])
    assert abs(found[0] - found[1]) <= 0.02
