"""Calibration images from a network alone: one entry point for all methods."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.calib.fitting import OWN_INPUTS, advice, fitting
from zsq_deploy.calib.manifest import CalibrationManifest
from zsq_deploy.calib.methods import METHODS, Method
from zsq_deploy.calib.parts.memory import Peak, forget_peak, peak_so_far
from zsq_deploy.calib.parts.precision import resolved as resolved_precision
from zsq_deploy.calib.parts.recipe import resolve
from zsq_deploy.calib.running import Run
from zsq_deploy.calib.writer import CalibrationWriter
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.model.graph import TensorSpec
from zsq_deploy.progress import SILENT, Progress

__all__ = ["synthesize"]

Arrays = dict[str, np.ndarray[Any, Any]]

_HERE, _NOBODY = torch.device("cpu"), Peak()


def synthesize(
    model: Model,
    *,
    method: str = "zeroq",
    images: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
    parameters: Mapping[str, Any] | None = None,
    others: Sequence[Model] = (),
    workers: int = 1,
    output: Path | None = None,
    precision: str = "float32",
    compiled: bool = False,
) -> CalibrationSet:
    """Make a calibration set for a network without any data.

    Args:
        model: The network, batch norms in place.
        method: A name in :data:`~zsq_deploy.calib.methods.METHODS` that makes images.
        images: How many.
        seed: Source of everything random, 0 or more. Same seed, device and threads (of each worker): the same set, bit for bit.
        device: Where it is computed; ``None``: ``cuda`` when there is one, else ``cpu``.
        batch_size: Images that are made together; ``None``: the method's own, or less where memory demands it.
        workdir: Folder for checkpoints; ``None``: an interrupted run cannot be resumed.
        resume: Go on from what an interrupted run left in `workdir`.
        progress: Where to report.
        parameters: The method's parameters, where they differ from its defaults.
        others: Further networks with the same input that the images are to fit as well, for methods that can use them (MixMix).
        workers: Processes that make batches at the same time, each with an equal share of the threads; on several GPUs, one each in turn.
        output: Folder to write the set to; ``None``: it is returned in memory. With a folder, no more than one batch is in memory
            at a time, and what is in `workdir` is left for the caller to remove.
        precision: ``float32``; ``bfloat16``: convolutions and matrix products of the network read bfloat16, everything else stays float32; ``auto``:
            ``bfloat16`` on a GPU that computes in it.
        compiled: Make one program of the network's forward pass with `torch.compile`. The images are the same up to rounding.

    Returns:
        The set, float32 in the network's input space, with a manifest that says how it was made. Its ``parameters`` hold the
        resolved recipe and, under ``outcome``, steps and losses of each batch.

    Raises:
        UsageError: The method or one of its parameters is unknown, or numbers make no sense.
        CalibrationError: The method cannot be applied to this network, or the network cannot be compiled.
        InterruptedRunError: The user interrupted; the state is kept in `workdir`.
        StaleArtifactError: `resume` with a `workdir` of another run.
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no synthesis method {method!r}", where="--method", remedy=f"choose one of {', '.join(METHODS)}"
        )
    chosen = METHODS[method]
    if images < 1:
        raise UsageError(f"{images} images were asked for", where="--images", remedy="ask for 1 or more")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"a batch of {batch_size} images makes no sense", where="batch_size", remedy="give 1 or more")
    if workers < 1:
        raise UsageError(f"{workers} workers make nothing", where="--workers", remedy="give 1 or more")
    if seed < 0:
        raise UsageError(f"the seed {seed} is negative", where="--seed", remedy="give 0 or more")
    if not chosen.images:
        raise CalibrationError(
            f"method {method!r} makes no images: {chosen.summary}",
            where="--method",
            remedy="hand your own images over as a calibration set"
            if method == "real"
            else "use its ranges directly (`zsq quantize`), or choose a method that makes images",
        )
    resolved = resolve(method, chosen.defaults, parameters)
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = resolved_precision(precision, place)
    started, notes = time.monotonic(), list[str]()
    forget_peak(place)
    requested: str | None = None
    if chosen.needs_bn:
        if model.batch_norms():
            _single_image_input(model, method)
        elif chosen.fallback is not None:
            if chosen.fallback not in fitting(model):
                raise CalibrationError(
                    f"the network holds no batch-norm statistics, and {method!r} has nothing else to learn from; {chosen.fallback!r}, which is "
                    f"used instead for pictures, cannot make {', '.join(f'{spec.name!r} of shape {list(spec.shape)}' for spec in model.inputs)}",
                    where=model.name,
                    remedy=f"if it was trained with batch norm, export it with batch norm kept; else {advice(model)}",
                )
            note = (
                f"the network holds no batch-norm statistics (it never had any, or they were folded into the convolutions "
                f"before export), and {method!r} has nothing else to learn from. Used instead: {chosen.fallback!r} "
                f"({METHODS[chosen.fallback].summary}), because structured pictures excite filters more like "
                f"photographs do than noise does. If the network was trained with batch norm, export it with batch norm kept"
            )
            progress.say(note)
            notes.append(note)
            requested, chosen, resolved = method, METHODS[chosen.fallback], {}
    with ExitStack() as stack:
        if chosen.run is None:
            outcome: dict[str, Any] = {} if requested is None else {"requested_method": requested}
            return _collect(
                _draw(chosen, model, images, seed, progress),
                output,
                CalibrationManifest.of(
                    model, method=chosen.name, parameters={**resolved, **outcome}, seed=seed, device="cpu", notes=notes
                ),
                started,
            )
        if others and not chosen.several_networks:
            raise UsageError(
                f"method {method!r} looks at one network",
                where="others",
                remedy="leave them away, or use --method mixmix",
            )
        folder = workdir
        if folder is None and (workers > 1 or output is not None):  # batches are handed over, or kept, as files
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zsq-synthesis-")))
        threads = torch.get_num_threads()
        run = Run(
            method=chosen.name,
            model=model,
            others=tuple(others),
            parameters=resolved,
            images=images,
            seed=seed,
            device=place,
            batch_size=batch_size,
            workdir=folder,
            resume=resume,
            workers=workers,
            threads=max(1, threads // workers) if place.type == "cpu" else threads,
            progress=progress,
            notes=notes,
            precision=width,
            compiled=compiled,
        )
        stage, outcome, seconds, beside = run.optimise()
        manifest = CalibrationManifest.of(
            model,
            method=chosen.name,
            parameters={**resolved, **outcome},
            seed=seed,
            device=place.type,
            notes=notes,
        )
        spec = model.inputs[0]
        images_made = ({spec.name: part} for part in stage.images())
        made = _collect(images_made, output, manifest, started, seconds=seconds, device=place, workers=beside)
        if output is None:
            stage.forget()
        return made


def _collect(
    pieces: Iterator[Arrays],
    output: Path | None,
    manifest: CalibrationManifest,
    started: float,
    *,
    seconds: float | None = None,
    device: torch.device = _HERE,
    workers: Peak = _NOBODY,
) -> CalibrationSet:
    """The pieces as one set, in memory or in a folder."""

    def fields() -> dict[str, Any]:
        peak = peak_so_far(device).beside(workers)
        took = time.monotonic() - started if seconds is None else seconds
        return {"seconds": took, "peak_rss_bytes": peak.host, "peak_gpu_bytes": peak.gpu}

    if output is not None:
        with CalibrationWriter(output, manifest, force=True) as writer:
            for piece in pieces:
                writer.append(piece)
            return writer.finish(**fields())
    held: dict[str, list[np.ndarray[Any, Any]]] = {}
    for piece in pieces:
        for name, array in piece.items():
            held.setdefault(name, []).append(array)
    arrays = {name: np.concatenate(parts) for name, parts in held.items()}
    return CalibrationSet.from_arrays(arrays, manifest.model_copy(update=fields()))


def _single_image_input(model: Model, method: str) -> TensorSpec:
    if len(model.inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in model.inputs)
        raise CalibrationError(
            f"the network has {len(model.inputs)} inputs ({names}); method {method!r} optimises one, because batch-norm "
            "statistics do not say which input should account for what",
            where=model.name,
            remedy=advice(model),
        )
    spec = model.inputs[0]
    if spec.dtype.kind != "f":
        raise CalibrationError(
            f"input {spec.name!r} takes {spec.dtype} values, which cannot be optimised by gradients",
            where=spec.name,
            remedy=OWN_INPUTS,
        )
    if METHODS[method].pictures and len(spec.shape) != 4:
        raise CalibrationError(
            f"input {spec.name!r} of shape {spec.shape} is no image, and method {method!r} makes images",
            where=spec.name,
            remedy=advice(model),
        )
    return spec


def _draw(method: Method, model: Model, images: int, seed: int, progress: Progress) -> Iterator[Arrays]:
    """Inputs of a method that does not look at the network, a few at a time."""
    assert method.baseline is not None
    with progress.task(f"{method.name} images", images) as task:
        for offset in range(0, images, 16):
            count = min(16, images - offset)
            yield {
                spec.name: method.baseline(
                    spec, count, seed=seed, preprocess=model.preprocess, offset=offset, stream=stream
                )
                for stream, spec in enumerate(model.inputs)
            }
            task.advance(count)
