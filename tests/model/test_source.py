"""Where networks come from: code on disk, weight files of both kinds, exported programs, modules at hand, timm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model import Preprocess, load_model

CODE = """
from torch import nn
from source_net_parts import width

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, width(), 3, bias=False)
        self.bn = nn.BatchNorm2d(width())
    def forward(self, x):
        return self.bn(self.conv(x)).relu()

    @staticmethod
    def build():
        return Net()

ready = Net()
"""

SHAPE = (1, 3, 8, 8)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "source_net.py").write_text(CODE)
    (tmp_path / "source_net_parts.py").write_text("def width(): return 4\n")
    yield tmp_path
    for name in ("source_net", "source_net_parts"):
        sys.modules.pop(name, None)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.weight": torch.randn(4, generator=generator),
        "bn.bias": torch.randn(4, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator) + 0.5,
    }


def reference(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    y = nn.functional.conv2d(x, tensors["conv.weight"])
    bn = (tensors[f"bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return nn.functional.batch_norm(y, *bn).relu()


@pytest.mark.parametrize("form", ["safetensors", "pt", "pth, nested", "pt, data parallel"])
def test_weight_files(code, form, ort_run, relative_error):
    tensors, path = state(), code / f"w.{form.split(',')[0]}"
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif "nested" in form:
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    elif "parallel" in form:
        torch.save({f"module.{key}": value for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    model = load_model("source_net:Net", path=code, weights=path, input_shape=SHAPE)
    x = torch.randn(3, 3, 8, 8)
    assert relative_error(ort_run(model.graph, x.numpy())[0], reference(tensors, x).numpy()) < 1e-5
    assert (model.name, model.source) == ("Net", "source_net:Net")


@pytest.mark.parametrize("name", ["Net", "Net.build", "ready"])
def test_what_may_stand_after_the_colon(code, name):
    before = list(sys.path)
    assert len(load_model(f"source_net:{name}", path=code, input_shape=SHAPE).batch_norms()) == 1
    assert sys.path == before


def test_a_module_of_the_same_name_elsewhere_is_put_aside(code, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "source_net.py").write_text("from torch import nn\ndef only_here(): return nn.Conv2d(3, 2, 1)\n")
    load_model("source_net:Net", path=code, input_shape=SHAPE)
    first = sys.modules["source_net"]
    assert load_model("source_net:only_here", path=other, input_shape=SHAPE).outputs[0].shape == (None, 2, 8, 8)
    assert sys.modules["source_net"] is first


def test_name_and_preprocessing_are_carried():
    preprocess = Preprocess((0.5,), (0.25,))
    model = load_model(nn.Conv2d(3, 2, 1), input_shape=SHAPE, preprocess=preprocess, name="mine")
    assert (model.name, model.preprocess) == ("mine", preprocess)
    assert load_model(nn.Conv2d(3, 2, 1), input_shape=SHAPE).preprocess == Preprocess()


def exported(path: Path, *, free: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    nn.init.normal_(net[1].running_mean)
    example = torch.randn(2 if free else 1, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=shapes), path)
    return net


@pytest.mark.parametrize("free", [True, False])
def test_exported_programs(tmp_path, free, ort_run, relative_error):
    net = exported(tmp_path / "net.pt2", free=free)
    model = load_model(tmp_path / "net.pt2")
    assert model.name == "net"
    assert model.dynamic_batch
    assert len(model.batch_norms()) == 1
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = net(x).numpy()
    for graph in (model.graph, model.folded().graph):
        assert relative_error(ort_run(graph, x.numpy())[0], wanted) < 1e-5
    assert model.digest == load_model(tmp_path / "net.pt2").digest


def test_model_and_twin_agree():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model = load_model(net, input_shape=SHAPE)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.twin(device="cpu")(x), net(x), rtol=1e-5, atol=1e-6)
    assert model.folded() is model.folded()


# -- timm -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    from zsq_deploy.model.source import _import_timm

    try:
        return _import_timm()
    except ModelError as error:
        pytest.skip(f"timm cannot be used here: {error.what}")


def test_timm_names(timm, tmp_path, ort_run, relative_error):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", pretrained=False).eval()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load_model("timm:test_resnet", weights=tmp_path / "w.safetensors")
    config = net.pretrained_cfg
    assert model.inputs[0].shape == (None, *config["input_size"])
    assert model.preprocess == Preprocess(tuple(config["mean"]), tuple(config["std"]))
    assert any("timm" in note for note in model.notes)
    assert len(model.batch_norms()) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    x = torch.randn(2, *config["input_size"])
    with torch.no_grad():
        wanted = net(x).numpy()
    assert relative_error(ort_run(model.folded().graph, x.numpy())[0], wanted) < 1e-5


def test_unknown_timm_names(timm):
    with pytest.raises(UsageError, match="no network called 'resnet180'") as caught:
        load_model("timm:resnet180")
    assert "resnet18" in caught.value.remedy


FAMILIES = {  # input size
    "convnext_atto": 64,
    "deit_tiny_patch16_224": 224,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "ghostnet_050": 64,
    "inception_v3": 128,
    "mnasnet_small": 64,
    "mobilenetv3_small_050": 64,
    "regnety_002": 64,
    "swin_tiny_patch4_window7_224": 224,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(timm, name, ort_run, relative_error):
    """Whole networks of timm with random weights: cleaned and folded graphs in ONNX Runtime against torch."""
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = load_model(net, input_shape=(1, 3, FAMILIES[name], FAMILIES[name]))
    assert model.dynamic_batch
    operators = {node.op_type for node in model.graph}
    assert not operators & {"Cast", "ConstantOfShape", "GatherND", "Identity", "Range", "ScatterND", "SplitToSequence"}
    x = torch.randn(3, 3, FAMILIES[name], FAMILIES[name])
    with torch.no_grad():
        wanted = net(x).numpy()
    for graph in (model.graph, model.folded().graph):
        assert relative_error(ort_run(graph, x.numpy())[0], wanted) < 1e-5
