"""The commands. Each one reads its options, calls the library, and prints; nothing is computed here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zsq_deploy import __version__
from zsq_deploy.cli import benches, bundles, devices, environments, methods, pot_config
from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.options import devices as d
from zsq_deploy.cli.options import quantize as q
from zsq_deploy.cli.options import verify as v
from zsq_deploy.cli.printing import print_json, progress_for
from zsq_deploy.cli.shared import EVALUATION, IMAGES, MODEL, QUANTIZATION, RUN, SEED, with_options
from zsq_deploy.cli.words import recipe_from
from zsq_deploy.errors import UsageError

__all__ = ["app", "run"]

app = typer.Typer(
    name="zsq",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a trained network to a verified integer engine for an edge device, without any training data.\n\n"
    "Start with `zsq demo`, or with your own network: `zsq deploy net.onnx --mean .485,.456,.406 --std .229,.224,.225 -o out`.",
)


app.command("bundle", short_help="Pack an engine with what proves it on a device.")(bundles.bundle)
app.command("bench", short_help="Latency of finished engines, here beside float, or on devices.")(benches.bench)
app.add_typer(devices.app, name="devices", short_help="Your devices by name.")
app.add_typer(methods.app, name="methods", short_help="The ways to make calibration images, explained.")
app.add_typer(environments.app, name="env", short_help="Environments of their own, for POT.")
app.add_typer(pot_config.importing, name="import", short_help="Turn another tool's configuration into a recipe.")
app.add_typer(pot_config.exporting, name="export", short_help="Write a recipe as another tool's configuration.")

_INTERRUPTED = 130


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and give the exit code; usage errors of the parser are 2."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="zsq", standalone_mode=False)
    except typer.Exit as stop:
        result = stop.exit_code
    except typer.Abort as stop:
        raise KeyboardInterrupt from stop
    except Exception as error:
        # Typer brings its own copy of click, whose usage errors can be told by what they can do.
        show: Any = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return 2
    if result == _INTERRUPTED:  # the parser turns Ctrl-C into this code and says nothing
        raise KeyboardInterrupt
    return int(result) if isinstance(result, int) else 0


def _show(outcome: Any, as_json: bool) -> None:
    from zsq_deploy.report.text import print_summary

    if as_json:
        print_json(outcome.report.model_dump(mode="json", by_alias=True))
    else:
        print_summary(outcome.report, Console())
        Console().print(f"\nreport: {outcome.folder / 'report.html'}", highlight=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"zsq-deploy {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command(short_help="The whole job: network in, verified engines out.")
@with_options(*MODEL, *IMAGES, *QUANTIZATION, *EVALUATION, *RUN)
def deploy(
    said: dict[str, Any],
    output: o.OutputOpt,
    force: o.ForceOpt = False,
    resume: o.ResumeOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """The whole job: a network in, verified integer engines and a report out.

    Images are synthesized from the network, activation ranges are measured on them, the target's own quantizer builds the engine,
    and the engine is compared with exact integer arithmetic, the fake-quant reference and float. Exit code 0: fine; 1: a gate was
    missed; 2: wrong use.

    \b
    zsq deploy net.onnx --mean .485,.456,.406 --std .229,.224,.225 -o out
    zsq deploy mynets:build --path . --weights w.safetensors --input-shape 1x3x32x32 -o out
    zsq deploy net.onnx --target ort-arm64 --eval-data test.npz --max-accuracy-drop 0.01 -o out
    """
    from zsq_deploy.pipeline import deploy as job

    recipe = recipe_from(said)
    outcome = job(
        recipe, output, force=force, resume=resume, command=shlex.join(sys.argv), progress=progress_for(quiet, as_json)
    )
    _show(outcome, as_json)
    return outcome.exit_code


def _words(value: bool) -> None:
    if value:
        from zsq_deploy.recipe import describe

        for item in describe():
            sys.stdout.write(f"{item.name:38} {item.default or '-':14} {item.description}\n")
        raise typer.Exit


@app.command("run", short_help="Do what a recipe file says.")
def run_recipe(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; every run leaves one as recipe.resolved.yaml.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output folder (default: run.output of the recipe).")
    ] = None,
    words: Annotated[
        bool,
        typer.Option(
            "--words", callback=_words, is_eager=True, help="List every word of a recipe with its default, and stop."
        ),
    ] = False,
    force: o.ForceOpt = False,
    resume: o.ResumeOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Do what a recipe file says: the same job as deploy, with all options in one YAML file.

    \b
    zsq run out/recipe.resolved.yaml -o again      the same images and the same engines, bit for bit
    zsq run --words                                everything that a recipe can say
    """
    from zsq_deploy.pipeline import deploy as job
    from zsq_deploy.recipe import Recipe

    del words
    loaded = Recipe.load(recipe).resolved()
    folder = output or (Path(loaded.run.output) if loaded.run.output else None)
    if folder is None:
        raise UsageError("no output folder", where="-o/--output", remedy="give -o, or run.output in the recipe")
    outcome = job(
        loaded, folder, force=force, resume=resume, command=shlex.join(sys.argv), progress=progress_for(quiet, as_json)
    )
    _show(outcome, as_json)
    return outcome.exit_code


@app.command(short_help="Make calibration images from the network alone.")
@with_options(*MODEL, *IMAGES, SEED)
def synth(
    said: dict[str, Any],
    output: o.OutputOpt,
    export: Annotated[
        str | None,
        typer.Option(
            "--export",
            metavar="FORMAT",
            help="Also write the set for another tool: test-data (onnx .pb folders), polygraphy (inputs JSON), npy (list of .npy).",
        ),
    ] = None,
    real_data: o.RealDataOpt = None,
    resize: v.ResizeOpt = False,
    force: o.ForceOpt = False,
    resume: o.ResumeOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Synthesize a calibration set from the network alone, and say how good it is.

    \b
    zsq synth net.onnx --images 256 -o set
    zsq synth net.onnx --real-data photos/ -o set       also compare its ranges with those of real images
    zsq synth net.onnx --export polygraphy -o set       also as inputs for another tool
    zsq quantize net.onnx --calibration set/calibration -o out
    """
    from zsq_deploy.calib.quality import lines
    from zsq_deploy.pipeline.stages import synthesize_set
    from zsq_deploy.report.words import bytes_text

    recipe = recipe_from(said)
    made = synthesize_set(
        recipe,
        output,
        export=export,
        real_data=real_data,
        resize=resize,
        force=force,
        resume=resume,
        progress=progress_for(quiet, as_json),
    )
    manifest = made.images.manifest
    if as_json:
        advice = made.recommendation.to_json() if made.recommendation else None
        print_json({**manifest.model_dump(mode="json"), "quality": made.quality.to_json(), "recommendation": advice})
    else:
        peak = bytes_text(manifest.peak_rss_bytes)
        if manifest.peak_gpu_bytes is not None:
            peak += f" and {bytes_text(manifest.peak_gpu_bytes)} of the GPU"
        sys.stdout.write(
            f"{len(made.images)} {manifest.method} images in {manifest.seconds:.1f} s with {peak} of memory: {output}\n"
        )
        for reason in made.recommendation.reasons if made.recommendation else ():
            sys.stdout.write(f"auto: {reason}\n")
        for line in lines(made.quality):
            sys.stdout.write(f"{line}\n")
        for note in manifest.notes:
            sys.stdout.write(f"note: {note}\n")
    return 0


@app.command(short_help="Build engines, without measuring their quality.")
@with_options(*MODEL, *IMAGES, *QUANTIZATION, *RUN)
def quantize(
    said: dict[str, Any],
    output: o.OutputOpt,
    force: o.ForceOpt = False,
    resume: o.ResumeOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Build engines from a calibration set (or make one first), without measuring their quality.

    \b
    zsq quantize net.onnx --target ort-arm64 -o out
    zsq verify out --eval-data test.npz
    """
    from zsq_deploy.pipeline.stages import quantize_only

    recipe = recipe_from(said)
    built = quantize_only(recipe, output, force=force, resume=resume, progress=progress_for(quiet, as_json))
    if as_json:
        print_json(
            {
                name: {
                    "path": str(engine.path),
                    "bytes": engine.bytes,
                    **{key: engine.choices[key] for key in ("expected_kernels",) if key in engine.choices},
                }
                for name, engine in built.items()
            }
        )
    else:
        for name, engine in built.items():
            sys.stdout.write(f"{name}: {engine.path} ({engine.bytes:,} bytes)\n")
            for line in engine.choices.get("expectation", ()):  # which kernels the runtime should make of it
                sys.stdout.write(f"  {line}\n")
    return 0


@app.command(short_help="Measure finished engines again.")
@with_options(*EVALUATION)
def verify(
    said: dict[str, Any],
    folder: o.OutArg,
    target: o.OnlyTargetOpt = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="Threads of the engine (default: as before).")
    ] = None,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Measure finished engines again, here and now, and write the report anew.

    Nothing is built. Engines that were changed since they were written are refused.

    \b
    zsq verify out --eval-data test.npz --max-accuracy-drop 0.01
    """
    from zsq_deploy.pipeline.stages import verify_folder

    eval_data = said["verification.eval_data"]
    changes: dict[str, Any] = {
        **said,
        "verification.eval_data": str(eval_data.resolve()) if eval_data else None,
        "verification.resize": said["verification.resize"] or None,
        "run.threads": threads,
    }
    outcome = verify_folder(
        folder,
        targets=target,
        changes={name: value for name, value in changes.items() if value is not None},
        command=shlex.join(sys.argv),
        progress=progress_for(quiet, as_json),
    )
    _show(outcome, as_json)
    return outcome.exit_code


@app.command(short_help="Check report.json and draw report.html again.")
def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT|report.json", help="An output folder, or a report.json.")],
    as_json: o.JsonOpt = False,
) -> int:
    """Check report.json and draw report.html from it again."""
    from zsq_deploy.report.html import write as write_html
    from zsq_deploy.report.schema import load
    from zsq_deploy.report.text import print_summary

    file = folder / "report.json" if folder.is_dir() else folder
    loaded = load(file)
    page = file.with_name("report.html")
    write_html(loaded, page)
    if as_json:
        print_json(loaded.model_dump(mode="json", by_alias=True))
    else:
        print_summary(loaded, Console())
        Console().print(f"\nreport: {page}", highlight=False, soft_wrap=True)
    return 0


@app.command(short_help="Show what a network, engine, set, folder or cache holds.")
def inspect(
    thing: Annotated[
        str,
        typer.Argument(
            metavar="THING",
            help="A network (as for deploy), an engine, a calibration set, an output folder, a calibration cache or table, or the layers "
            "of a TensorRT engine.",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="Compare a calibration cache, table or ranges with this one."),
    ] = None,
    path: o.PathOpt = None,
    weights: o.WeightsOpt = None,
    input_shape: o.ShapeOpt = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="List every node (names for --exclude).")] = False,
    as_json: o.JsonOpt = False,
) -> int:
    """Show what a network, engine, calibration set, output folder, calibration cache or table holds.

    \b
    zsq inspect net.onnx --nodes        all nodes, with the names that --exclude takes
    zsq inspect out                     engines, sets and report of an output folder
    zsq inspect a.cache --against b.cache   two calibration caches, tensor by tensor
    zsq inspect int8.layers.json        what a TensorRT engine computes in, from a file of its device
    """
    from zsq_deploy.cli.inspecting import compare_things, describe_thing, print_description

    if against is not None:
        found = compare_things(Path(thing), against)
    else:
        found = describe_thing(thing, path=path, weights=weights, input_shape=input_shape, nodes=nodes)
    if as_json:
        print_json(found)
    else:
        print_description(found, Console())
    return 0


@app.command(short_help="Check a quantized graph against a target's rules.")
def lint(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A Q/DQ graph (.onnx) or an IR (.xml), made here or by another tool.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="The target that it is meant for (default: ort-x86-vnni; for an IR openvino-cpu).",
        ),
    ] = None,
    as_json: o.JsonOpt = False,
) -> int:
    """Check a quantized graph against a target's rules: node, rule, and what to do.

    Exit code 0: nothing to complain about; 1: findings. Engines of other tools are welcome.

    \b
    zsq lint model.quant.onnx --target ort-x86-vnni
    zsq lint model.xml
    """
    from zsq_deploy.cli.inspecting import default_target, lint_file

    target = target or default_target(file)
    findings = lint_file(file, target)
    if as_json:
        print_json(findings)
    elif not findings:
        sys.stdout.write(f"{file}: nothing to complain about for {target}\n")
    else:
        for item in findings:
            sys.stdout.write(f"{item['node']}: {item['rule']}: {item['message']}\n  to do: {item['remedy']}\n")
    return 1 if findings else 0


@app.command(short_help="What this machine has, and what is missing.")
def doctor(
    device: d.OneDeviceOpt = None,
    python: d.PythonOpt = None,
    accept_new_host_key: d.AcceptOpt = False,
    as_json: o.JsonOpt = False,
) -> int:
    """Say what this machine or a device has, which targets it can build and measure, and what is missing."""
    from zsq_deploy.doctor import examine, print_examination

    if device is not None:
        return devices.examine_device(device, python=python, accept_new=accept_new_host_key, as_json=as_json)

    found = examine()
    if as_json:
        print_json(found)
    else:
        print_examination(found, Console())
    return 0


@app.command(short_help="The whole job on an embedded example, offline.")
def demo(
    output: o.OutputOpt = Path("demo-out"),
    method: o.MethodOpt = "zeroq",
    images: o.ImagesOpt = 48,
    target: q.TargetOpt = ["ort-x86-vnni"],  # noqa: B006
    seed: o.SeedOpt = 0,
    threads: o.ThreadsOpt = 1,
    force: o.ForceOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """The whole job on the embedded example: train a small network on digits, quantize it without them, report. Offline."""
    from zsq_deploy.pipeline.stages import run_demo

    outcome = run_demo(
        output,
        method=method,
        images=images,
        targets=target,
        seed=seed,
        threads=threads,
        force=force,
        command=shlex.join(sys.argv),
        progress=progress_for(quiet, as_json),
    )
    _show(outcome, as_json)
    return outcome.exit_code
