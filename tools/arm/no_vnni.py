"""What an x86 processor without VNNI makes of engines: accuracy with and without the protection against int16 saturation.

    zsq quantize net.onnx --target ort-x86-vnni --target ort-x86-avx2 -o out
    python tools/arm/no_vnni.py out --eval-data test.npz --images 200

Every engine for ONNX Runtime in the folder runs on this machine, and again in a process for which qemu's user-mode emulation plays a
processor without VNNI (``qemu-x86_64 -cpu Haswell``, package qemu-user-static). There u8 x s8 products are summed in pairs in saturating
int16. The table says what that does to accuracy, and whether our model of it (``Arithmetic(saturating_pairs=True)``) gives the same outputs.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends import get_backend
from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.backends.onnxruntime.kernels import Arithmetic
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import UsageError, ZsqError
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.pipeline.control import judged_images
from zsq_deploy.pipeline.deploy import classes_of, evaluation_data, load_recipe_model
from zsq_deploy.pipeline.stages import open_engine, recipe_in
from zsq_deploy.pipeline.verification import Evidence

Array = npt.NDArray[Any]

# It runs under the emulator, where importing little saves minutes.
_RUN = """
import sys
import numpy as np, onnxruntime as ort
feeds = dict(np.load(sys.argv[2]))
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
for pair in sys.argv[4:]:
    options.add_session_config_entry(*pair.split('=', 1))
session = ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])
count = len(next(iter(feeds.values())))
parts = [session.run(None, {k: v[i:i + 8] for k, v in feeds.items()}) for i in range(0, count, 8)]
np.savez(sys.argv[3], **{o.name: np.concatenate(p) for o, p in zip(session.get_outputs(), zip(*parts))})
"""


def emulated(engine: Path, feeds: Mapping[str, Array], session: Mapping[str, str], cpu: str) -> dict[str, Array]:
    """The outputs of an engine on an emulated x86 processor.

    Raises:
        UsageError: There is no emulator.
        ZsqError: The run failed.
    """
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        raise UsageError("the emulator qemu-x86_64-static is missing", remedy="apt-get install qemu-user-static")
    with tempfile.TemporaryDirectory(prefix="zsq-no-vnni-") as temporary:
        place, out = Path(temporary) / "in.npz", Path(temporary) / "out.npz"
        np.savez(place, **feeds)  # type: ignore[arg-type]
        words = [f"{key}={value}" for key, value in session.items()]
        line = [emulator, "-cpu", cpu, sys.executable, "-c", _RUN, str(engine), str(place), str(out), *words]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ZsqError(f"the emulated run failed: {done.stderr.strip()[-500:]}", where=str(engine))
        with np.load(out) as found:
            return {name: found[name] for name in found.files}


def _share(part: Array) -> str:
    return f"{100 * float(np.mean(part)):.2f}"


def rows(out: Path, data: Path | None, images: int, cpu: str) -> list[tuple[str, ...]]:
    """One row an engine of a folder."""
    recipe = recipe_in(out).resolved()
    model = load_recipe_model(recipe)
    labelled = (
        evaluation_data(recipe, model)
        if data is None
        else load_eval_data(data, model.inputs[0], classes=classes_of(model), limit=images)
    )
    evidence = Evidence(labelled, judged_images(recipe, CalibrationSet.open(out / "holdout")))
    feeds, labels = next(iter(evidence.batches(model, min(images, evidence.images))))
    name = model.outputs[0].name
    found = []
    floating: Array | None = None
    for target in recipe.targets:
        engine = open_engine(out, target)
        if engine.target.runtime != "onnxruntime":
            continue
        runner = get_backend(engine.target).runner(engine.path, engine.target)
        if floating is None and engine.float_path is not None and engine.float_path.is_file():
            floating = (
                get_backend(engine.target).runner(engine.float_path, engine.target, mode="float").run(feeds)[name]
            )
        here = runner.run(feeds)[name]
        there = emulated(engine.path, feeds, engine.target.session, cpu)[name]
        small = {key: value[:16] for key, value in feeds.items()}
        model_of_it = IntegerReference(engine, arithmetic=Arithmetic(saturating_pairs=True)).run(small)[name]
        top = [array.argmax(1) if array.ndim == 2 else None for array in (here, there)]
        classes = top[0] is not None and top[1] is not None
        known = labels if labels is not None and classes else None
        noise = float(((here - there).astype(np.float64) ** 2).sum())
        signal = float((here.astype(np.float64) ** 2).sum())
        found.append(
            (
                model.name,
                target,
                "-" if known is None or floating is None else _share(floating.argmax(1) == known),
                "-" if known is None else _share(top[0] == known),
                "-" if known is None else _share(top[1] == known),
                _share(top[0] == top[1]) if classes else "-",
                _share(here == there),
                "equal" if noise == 0 else f"{10 * np.log10(signal / noise):.1f}",
                _share(model_of_it == there[: len(model_of_it)]),
            )
        )
    return found


HEAD = (
    "network",
    "engine",
    "float top-1 %",
    "with VNNI top-1 %",
    "without VNNI top-1 %",
    "same class %",
    "same outputs %",
    "SQNR dB",
    "= model of saturation %",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, nargs="+", help="output folders of zsq deploy or zsq quantize")
    parser.add_argument("--eval-data", type=Path, default=None, help="labelled images (default: those of the run)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--cpu", default="Haswell", help="the processor that the emulator plays (default: Haswell)")
    options = parser.parse_args(argv)
    try:
        print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        for out in options.out:
            for row in rows(out, options.eval_data, options.images, options.cpu):
                print("| " + " | ".join(row) + " |", flush=True)
    except ZsqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
