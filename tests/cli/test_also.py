"""Images for several networks at once, from the command line."""

from __future__ import annotations

import onnx
from small import onnx_model

from zsq_deploy.calib import CalibrationSet
from zsq_deploy.model import load_model

QUICK = ("--method", "mixmix", "--images", 4, "--param", "steps=6", "--param", "warmup=1")


def test_a_further_network_changes_the_images(place, tmp_path, zsq):
    other = tmp_path / "other.onnx"
    onnx.save(onnx_model(seed=3), other)
    for name, more in (("alone", ()), ("both", ("--also", other)), ("again", ("--also", other))):
        said = zsq("synth", place.network, "-o", tmp_path / name, *QUICK, *more, "-q")
        assert said.code == 0, said.err
    alone, both, again = (CalibrationSet.open(tmp_path / name / "calibration") for name in ("alone", "both", "again"))
    assert both.digest == again.digest != alone.digest
    both.check_fits(load_model(place.network))


def test_networks_that_do_not_go_together_are_refused(place, tmp_path, zsq):
    gray = tmp_path / "gray.onnx"
    onnx.save(onnx_model(1), gray)
    other = zsq("synth", place.network, "-o", tmp_path / "a", "--also", gray, "--images", 4)
    assert other.code == 2
    assert "mixmix" in other.err
    unfit = zsq("synth", place.network, "-o", tmp_path / "b", "--also", gray, *QUICK)
    assert unfit.code == 2
    assert "cannot share images" in unfit.err
    assert "1x3x8x8" in unfit.err
