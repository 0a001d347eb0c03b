"""`zsq bundle`: an engine, ready for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zsq_deploy.artifact import digest_file
from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.options import devices as d
from zsq_deploy.cli.printing import print_json, progress_for

__all__ = ["bundle"]


def bundle(
    engine: Annotated[
        Path, typer.Argument(metavar="OUT/TARGET", help="A target's folder in an output folder of deploy or quantize.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The bundle, such as net.zsq.tar.")],
    samples: d.SamplesOpt = 32,
    force: o.ReplaceOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Pack an engine with inputs, reference outputs and the program that proves and measures it on a device.

    On the device, with Python 3.9 or newer, numpy and the runtime, and nothing of zsq-deploy:

    \b
    zsq bundle out/ort-x86-vnni -o net.zsq.tar
    scp net.zsq.tar device:                       and there:
    tar xf net.zsq.tar && python agent.py         writes result.json
    """
    from zsq_deploy.pipeline.bundling import bundle_target

    made = bundle_target(engine, output, samples=samples, force=force, progress=progress_for(quiet, as_json))
    digest, size = digest_file(made), made.stat().st_size
    if as_json:
        print_json({"bundle": str(made), "bytes": size, "sha256": digest})
    else:
        console = Console()
        console.print(f"{made}: {size / 2**20:.2f} MiB, sha256 {digest}", highlight=False, soft_wrap=True)
        console.print("on the device: tar xf it into an empty folder, then: python agent.py", highlight=False)
    return 0
