"""What is decided by measuring the reference on synthetic images: ranges, exact scales, biases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.making import Job, quality_of
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.backends.tensorrt.quantizer import build
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT
from zsq_deploy.quant import Ranges

from .tensorrt_networks import images, network, ranges_of
from .test_tensorrt_bundle import Images

TEN = get_target("tensorrt-10")


def job(name: str, *, wider: float = 1.0, pictures: bool = True) -> Job:
    model = network(name)
    found = {key: (wider * low, wider * high) for key, (low, high) in ranges_of(model).items()}
    ranges = Ranges(found, "minmax + pictures", model_digest=model.folded().graph.digest)
    probes = {"image": images(model, 16, seed=3)} if pictures else None
    return Job(model, ranges, TEN, Images(images(model, 24)), probes, SILENT)


def test_ranges_that_are_far_too_wide_are_narrowed():
    wide = job("concat", wider=6.0)
    found, notes = wide.searched(BuildOptions())
    assert "ranges narrowed by search" in notes[0]
    assert found.ranges.method == "minmax + pictures + search"
    for name, (low, high) in found.ranges.items():
        assert wide.ranges[name][0] <= low <= high <= wide.ranges[name][1]
    assert found.ranges["stem_relu"][1] < wide.ranges["stem_relu"][1] / 3
    before, after = (
        quality_of(
            one.model,
            place_qdq(one.folded, one.ranges, TEN, BuildOptions()).graph,
            [{"image": images(one.model, 32, seed=5)}],
        )[1]
        for one in (wide, found)
    )
    assert after > before + 3.0


def test_nothing_is_searched_where_ranges_were_asked_for():
    """Only ``auto`` looks at pictures."""
    plain = job("concat", wider=6.0, pictures=False)
    assert plain.searched(BuildOptions()) == (plain, ())
    assert job("transformer").searched(BuildOptions(bits="w4a32"))[1] == ()


@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed"])
def test_exact_scales_cost_half_a_decibel_at_most(name):
    one = job(name)
    made, free = (one.explicit(BuildOptions(exact_scales=exact)) for exact in (True, False))
    assert one.judged(made.reference)["sqnr_db"] >= one.judged(free.reference)["sqnr_db"] - 0.5
    left = any("they are left free" in note for note in made.notes)
    assert made.options.exact_scales is not left


def test_biases_that_were_given_are_kept():
    one = job("residual")
    bias = one.folded.node("n_stem").input[2]
    given = {"n_stem": one.folded.constant(bias) + np.float32(0.25)}
    for options in (BuildOptions(biases=given, bias_correction=True), BuildOptions(biases=given, exact_scales=False)):
        made = one.explicit(options)
        assert np.array_equal(made.network.constant(made.network.node("n_stem").input[2]), given["n_stem"])
        assert made.options.biases == given


def test_a_calibrator_needs_images_and_a_name(tmp_path: Path):
    model = network("residual")
    with pytest.raises(CalibrationError, match="reads images, and there are none"):
        build(model, "tensorrt-minmax", TEN, tmp_path)
    with pytest.raises(UsageError, match="no range method of TensorRT's graphs"):
        build(model, "ort-minmax", TEN, tmp_path, calibration=Images(images(model, 8)))
    engine = build(model, "tensorrt-minmax", TEN, tmp_path, calibration=Images(images(model, 8)))
    assert engine.choices["ranges"] == "tensorrt-minmax"
    assert Graph.load(engine.path).opset >= 13
