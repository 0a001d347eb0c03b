"""OpenVINO's targets are values that load no runtime, and the runtime's options refuse what makes no sense."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from zsq_deploy.backends import TARGETS, BuildSettings, get_backend, get_target, target_names
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions, PotOptions, options_from
from zsq_deploy.backends.openvino.targets import DEVICE
from zsq_deploy.errors import UsageError

CPU, GPU, NPU = (get_target(f"openvino-{name}") for name in ("cpu", "gpu", "npu"))


def test_three_devices_with_unsigned_activations_and_symmetric_weights() -> None:
    assert [name for name in target_names() if name.startswith("openvino-")] == [CPU.name, GPU.name, NPU.name]
    for target in (CPU, GPU, NPU):
        assert TARGETS[target.name].runtime == "openvino"
        assert target.session[DEVICE] == target.name.rpartition("-")[2].upper()
        assert str(target.activation) == "u8 asymmetric per tensor"
        assert target.weight.symmetric
        assert target.weight.signed
        assert target.weight.qmin == -target.weight.qmax == -127
    assert CPU.session["INFERENCE_PRECISION_HINT"] == "f32"


def test_targets_load_no_runtime() -> None:
    code = (
        "import sys; from zsq_deploy.backends import get_target; get_target('openvino-cpu');"
        "print([name for name in ('openvino', 'nncf', 'torch', 'onnx') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_process_that_only_runs_an_engine_loads_no_torch_and_sends_nothing() -> None:
    code = (
        "import sys, zsq_deploy.backends.openvino.runner;"
        "print('openvino' in sys.modules, 'torch' in sys.modules, sys.modules.get('openvino_telemetry'))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False", "None"]
    assert said.stderr == ""


def test_devices_that_are_not_here_are_named() -> None:
    backend = get_backend(CPU)
    from zsq_deploy.backends.openvino.runtime import devices

    for target in (GPU, NPU):
        device = target.session[DEVICE]
        missing = backend.missing_features(target)
        assert bool(missing) == (not any(name.startswith(device) for name in devices()))
        assert all(device in name for name in missing)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BuildOptions(quantizer="pott"), "pott"),  # type: ignore[arg-type]
        (lambda: BuildOptions(bits="w9a8"), "w9a8"),
        (lambda: BuildOptions(weight_method="best"), "best"),
        (lambda: BuildOptions(compress_weights="int5"), "int5"),
        (lambda: NncfOptions(preset="fast"), "fast"),  # type: ignore[arg-type]
        (lambda: NncfOptions(model_type="mlp"), "mlp"),  # type: ignore[arg-type]
        (lambda: NncfOptions(subset_size=0), "0"),
        (lambda: NncfOptions(max_drop=-0.1), "-0.1"),
        (lambda: PotOptions(algorithm="DataFree"), "DataFree"),  # type: ignore[arg-type]
        (lambda: PotOptions(stat_subset_size=-3), "-3"),
    ],
)
def test_nonsense_is_refused_with_the_word_and_a_remedy(make: object, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()  # type: ignore[operator]
    assert says in str(caught.value)
    assert caught.value.remedy


def test_options_are_described_by_what_they_change() -> None:
    base = BuildOptions()
    assert json.loads(json.dumps(base.describe())) == base.describe()
    assert base.digest == BuildOptions().digest
    ones = np.ones(3, np.float32)
    changed = [
        base.with_(quantizer="nncf"),
        base.with_(quantizer="nncf", nncf=NncfOptions(preset="performance")),
        base.with_(exclude=("a",)),
        base.with_(biases={"a": ones}),
        base.with_(biases={"a": 2 * ones}),
        base.with_(exact_scales=True),
    ]
    assert len({base.digest, *(item.digest for item in changed)}) == len(changed) + 1
    # what NNCF is told does not matter to an engine that it does not quantize
    assert base.with_(nncf=NncfOptions(preset="performance")).digest == base.digest


def test_settings_become_options() -> None:
    settings = BuildSettings(
        quantizer="nncf", exclude=("a",), vendor={"nncf": {"preset": "performance", "subset_size": 7}}
    )
    options = options_from(settings, CPU)
    assert (options.quantizer, options.exclude, options.exact_scales) == ("nncf", ("a",), True)
    assert (options.nncf.preset, options.nncf.subset_size) == ("performance", 7)
    with pytest.raises(UsageError, match="--quantizer"):
        options_from(BuildSettings(quantizer="tensorrt"), CPU)
