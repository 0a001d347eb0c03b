"""Ctrl-C at any stage: exit code 130, what to do, no process left, and --resume gives what an undisturbed run would have given."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest
import small

from zsq_deploy.artifact import OutputFolder, digest_file
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import CalibrationError


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small.write_onnx(tmp_path_factory.mktemp("net") / "net.onnx")


def start(*arguments, **more):
    return subprocess.Popen(
        [small.executable(), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A suite that runs in the background of a shell inherits "ignore Ctrl-C"; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def children_of(group):
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def test_synthesis_goes_on_bit_for_bit(network, tmp_path, zsq):
    """The real program, interrupted in the middle of a batch, beside one that was left alone."""
    options = [
        "--images",
        24,
        "--param",
        "steps=400",
        "--param",
        "stop_patience=400",
        "--param",
        "batch_size=8",
        "--seed",
        5,
    ]
    out = tmp_path / "out"
    process = start("synth", network, "-o", out, *options)
    wait_for(lambda: (out / ".synthesis" / "batch-00000.safetensors").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130, complained
    assert said == ""
    assert "--resume" in complained
    assert "Traceback" not in complained
    assert not (out / "calibration").exists()

    refused = zsq("synth", network, "-o", out, *options, "-q")
    assert refused.code == 2
    assert "--resume" in refused.err
    other = zsq("synth", network, "-o", out, *options, "--param", "rate=0.2", "--resume", "-q")
    assert other.code == 2
    assert "recipe differs" in other.err

    assert zsq("synth", network, "-o", out, *options, "--resume", "-q").code == 0
    assert zsq("synth", network, "-o", tmp_path / "undisturbed", *options, "-q").code == 0
    resumed, undisturbed = (CalibrationSet.open(tmp_path / name / "calibration") for name in ("out", "undisturbed"))
    assert resumed.digest == undisturbed.digest
    assert not (out / ".synthesis").exists()


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_no_measuring_process_survives(network, tmp_path, whole_group):
    """A terminal interrupts all processes, `kill -INT` only the first one."""
    process = start(
        "deploy", network, "-o", tmp_path / "out", "--images", 8, "--method", "gaussian", "--no-search", "-q"
    )
    wait_for(lambda: len(children_of(process.pid)) > 2 or process.poll() is not None)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130, complained
    assert "--resume" in complained
    assert "Traceback" not in complained
    wait_for(lambda: not children_of(process.pid), 15)


STAGES = {
    "ranges": "zsq_deploy.pipeline.calibration.collect",
    "build": "zsq_deploy.pipeline.deploy.build_engine",
    "bias correction": "zsq_deploy.pipeline.correction.correct_bias",
    "evaluation": "zsq_deploy.pipeline.verification.evaluate",
    "latency": "zsq_deploy.pipeline.verification.compare_latency",
    "report": "zsq_deploy.pipeline.deploy.write_report",
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_interrupted_and_resumed(stage, network, tmp_path, zsq, place):
    """Images that were finished are not made again."""
    import importlib

    # `zsq_deploy.pipeline.deploy` is a function in its package: modules are patched by the import system's names.
    module, _, name = STAGES[stage].rpartition(".")
    owner = importlib.import_module(module)
    out = tmp_path / "out"
    arguments = ["deploy", network, "-o", out, "--images", 8, "--method", "gaussian", "--no-search", "-q"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        said = zsq(*arguments)
    assert said.code == 130
    assert "--resume" in said.err
    assert not (out / "report.html").exists()

    def never(*_, **__):
        raise AssertionError("the images were made again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsq_deploy.pipeline.calibration.synthesize", never)
        assert zsq(*arguments, "--seed", 1, "--resume").code == 2  # another recipe
        assert zsq("verify", out).code == 2  # nothing complete is there
        said = zsq(*arguments, "--resume")
    assert said.code == 0, said.err
    report = small.read(out / "report.json")
    assert report["calibration"]["images"] == 8
    assert not [file for file in out.rglob("*") if file.is_dir() and file.name in ("trial", "candidates", ".synthesis")]


def test_a_resumed_run_gives_the_undisturbed_engine(network, tmp_path, zsq):
    arguments = ["quantize", network, "--images", 8, "--method", "gaussian", "--no-search", "-q"]
    assert zsq(*arguments, "-o", tmp_path / "undisturbed").code == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsq_deploy.pipeline.correction.correct_bias", interrupted)
        assert zsq(*arguments, "-o", tmp_path / "out").code == 130
    assert zsq(*arguments, "-o", tmp_path / "out", "--resume").code == 0
    engines = [tmp_path / name / "ort-x86-vnni" / "engine.onnx" for name in ("undisturbed", "out")]
    assert digest_file(engines[0]) == digest_file(engines[1])


def test_a_set_that_was_cut_off_is_made_again(network, tmp_path, zsq):
    """An interruption while the sets are written: an unfinished set is not taken for a finished one."""
    arguments = [
        "quantize",
        network,
        "--images",
        8,
        "--method",
        "gaussian",
        "--no-search",
        "-q",
        "-o",
        tmp_path / "out",
    ]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsq_deploy.calib.writer.CalibrationWriter.finish", interrupted)
        assert zsq(*arguments).code == 130
    with pytest.raises(CalibrationError):
        CalibrationSet.open(tmp_path / "out" / "calibration")
    assert zsq(*arguments, "--resume").code == 0
    assert len(CalibrationSet.open(tmp_path / "out" / "calibration")) == 8


def test_a_killed_run_does_not_lock_its_folder(network, tmp_path, zsq):
    out = tmp_path / "out"
    process = start(
        "synth", network, "-o", out, "--images", 64, "--param", "steps=5000", "--param", "stop_patience=5000"
    )
    wait_for(lambda: (out / ".synthesis" / "run.json").exists() or process.poll() is not None)
    busy = zsq("synth", network, "-o", out, "--images", 4, "--method", "ones", "--force")
    assert busy.code == 2
    assert "another run" in busy.err
    process.kill()
    process.communicate(timeout=60)
    freed = zsq("synth", network, "-o", out, "--images", 4, "--method", "ones", "--force")
    assert freed.code == 0, freed.err


def test_verify_and_a_run_do_not_meet(place, zsq):
    with OutputFolder.reopen(place.out):
        said = zsq("verify", place.out)
    assert said.code == 2
    assert "another run" in said.err
