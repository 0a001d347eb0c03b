"""What can be said before the work begins: a recipe's mistakes cost seconds, not the minutes until the stage that stumbles over them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from zsq_deploy.backends import Target, get_backend
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.recipe import resolve
from zsq_deploy.errors import UsageError
from zsq_deploy.model import Model
from zsq_deploy.pipeline.auto import AUTO, check_auto
from zsq_deploy.pipeline.calibration import OWN_CALIBRATORS, RANGE_METHODS
from zsq_deploy.pipeline.engines import settings_of
from zsq_deploy.quant.reconstruct import PRESETS, PROTOCOLS
from zsq_deploy.recipe import Recipe

__all__ = ["check_device", "check_method", "check_recipe", "nearest"]

_AT_LEAST_ONE = ("batch_size", "generator_batch", "latent", "noise", "steps")
_ABOVE_ZERO = ("sigma",)
_AT_MOST = {"sigma": 100.0, "upsamplings": 10.0}
"""What overflows or fills the memory beyond; everything else has :data:`_MOST`."""
_MOST = 1e6


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'zeroq'? "``, or nothing."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def check_recipe(recipe: Recipe, model: Model, targets: Sequence[Target], *, verified: bool = True) -> None:
    """Refuse what cannot work: unknown words, a device that is not there, nodes that the network does not have.

    Args:
        recipe: The recipe.
        model: Its network.
        targets: Its targets.
        verified: The engines are verified later: images have to be held out.

    Raises:
        UsageError: The first mistake, with what to do.
    """
    check_method(recipe)
    check_device(recipe.calibration.device)
    _check_preprocess(model)
    spec = recipe.quantization
    ranges = (*RANGE_METHODS, *OWN_CALIBRATORS)
    if spec.ranges not in ranges:
        raise UsageError(
            f"there is no range method {spec.ranges!r}",
            where="--ranges",
            remedy=f"{nearest(spec.ranges, ranges)}range methods: {', '.join(ranges)}",
        )
    if spec.ranges in OWN_CALIBRATORS and not recipe.calibration.set and not METHODS[recipe.calibration.method].images:
        raise UsageError(
            f"{spec.ranges} reads images, and the method {recipe.calibration.method!r} makes none",
            where="--ranges",
            remedy="choose another range method, or a synthesis method that makes images",
        )
    nodes = [node.name for node in model.folded().graph]
    unknown = [name for name in spec.exclude if name not in nodes]
    if unknown:
        raise UsageError(
            f"the network has no node {unknown[0]!r}",
            where="--exclude",
            remedy=f"{nearest(unknown[0], nodes)}`zsq inspect {recipe.model.source} --nodes` lists them all",
        )
    strangers = sorted(set(spec.choice) - set(recipe.targets))
    if strangers:
        raise UsageError(
            f"{strangers[0]!r} is no target of this recipe",
            where="quantization.choice",
            remedy=f"{nearest(strangers[0], recipe.targets)}remove it, or add it to targets",
        )
    _check_low_bits(recipe, model)
    _check_quantizers(recipe, model, targets)
    if verified and recipe.calibration.holdout < 1:
        raise UsageError(
            "no image is held out, and verification needs some that nothing was calibrated on",
            where="calibration.holdout",
            remedy="hold out 1 or more (default: 64)",
        )


def check_measurable(targets: Sequence[Target]) -> None:
    """Refuse targets whose engines this program cannot run, before anything is made of which the end would be missing.

    A runtime that only builds says so with a function ``check_runs(target)`` in its module ``backend``.

    Raises:
        ZsqError: With what to do instead.
    """
    for target in targets:
        check_runs = getattr(get_backend(target), "check_runs", None)
        if check_runs is not None:
            check_runs(target)


def _check_low_bits(recipe: Recipe, model: Model) -> None:
    """Refuse protocols and schedules that there are not, and learning on a network that takes one batch size only."""
    spec = recipe.quantization
    for word, known, where in (
        (spec.protocol, PROTOCOLS, "--protocol"),
        (spec.reconstruct_preset, PRESETS, "--reconstruct-preset"),
    ):
        if word not in known:
            raise UsageError(
                f"there is no {word!r}", where=where, remedy=f"{nearest(word, known)}choose one of {', '.join(known)}"
            )
    settings = settings_of(recipe)
    if spec.size_budget is not None:
        if not settings.low_bits or spec.bits.lower() == "w8a8":
            raise UsageError(
                "a size budget shares out few bits among layers, and here all layers have the same"
                + (" 8 bits" if spec.bits.lower() == "w8a8" else ""),
                where="--size-budget",
                remedy="say how few bits a layer may have (--bits w4a8, with the quantizer auto or qdq), or leave the budget away",
            )
        if not recipe.calibration.set and not METHODS[recipe.calibration.method].images:
            raise UsageError(
                f"which layers keep 8 bits is measured on images, and the method {recipe.calibration.method!r} makes none",
                where="--size-budget",
                remedy="choose a synthesis method that makes images",
            )
    if spec.rounding not in ("moments", "learned"):
        return
    if not model.dynamic_batch:
        raise UsageError(
            "this network takes one batch size only, so its rounding cannot be found on batches of images",
            where="--rounding",
            remedy="export it with a free batch axis, or choose --rounding squant",
        )
    if not recipe.calibration.set and not METHODS[recipe.calibration.method].images:
        raise UsageError(
            f"rounding looks at images, and the method {recipe.calibration.method!r} makes none",
            where="--rounding",
            remedy="choose a synthesis method that makes images, or --rounding squant",
        )


def _check_quantizers(recipe: Recipe, model: Model, targets: Sequence[Target]) -> None:
    """Refuse what the runtime of a target does not do, and what no target reads."""
    spec = recipe.quantization
    known: set[str] = set()
    for target in targets:
        backend = get_backend(target)
        known.update(backend.QUANTIZERS)
        backend.check_options(model.folded().graph, target, backend.options_from(settings_of(recipe), target))
        if spec.ranges in OWN_CALIBRATORS and spec.ranges not in backend.CALIBRATORS:
            raise UsageError(
                f"{spec.ranges} is no calibrator of {target.runtime}, in which target {target.name!r} runs",
                where="--ranges",
                remedy=f"choose one of {', '.join((*RANGE_METHODS, *backend.CALIBRATORS))}"
                + (
                    "; NNCF's and POT's own statistics come with --quantizer nncf or pot"
                    if "nncf" in backend.QUANTIZERS
                    else ""
                ),
            )
    unread = sorted(set(spec.vendor) - known)
    if unread:
        raise UsageError(
            f"{unread[0].upper()} is told something, and it quantizes for none of these targets: {', '.join(recipe.targets)}",
            where=f"quantization.{unread[0]}",
            remedy="add an OpenVINO target (openvino-cpu), or leave those options out",
        )
    imageless = not recipe.calibration.set and not METHODS[recipe.calibration.method].images
    if spec.quantizer in ("nncf", "pot") and imageless:
        raise UsageError(
            f"{spec.quantizer.upper()} reads images, and the method {recipe.calibration.method!r} makes none",
            where="--quantizer",
            remedy="choose --quantizer qdq, or a synthesis method that makes images (fractal needs nothing of the network)",
        )


def check_method(recipe: Recipe) -> None:
    """Refuse an unknown synthesis method, and parameters that it does not have or that make no sense.

    Raises:
        UsageError: With the near miss, if there is one.
    """
    name = recipe.calibration.method
    check_auto(recipe)
    if recipe.calibration.set or name == AUTO:
        return  # nothing is made, or it is chosen once the network is known
    if name not in METHODS:
        raise UsageError(
            f"there is no synthesis method {name!r}",
            where="--method",
            remedy=f"{nearest(name, METHODS)}methods: {', '.join(METHODS)}, auto",
        )
    defaults = METHODS[name].defaults
    given = recipe.calibration.parameters
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise UsageError(
            f"method {name!r} has no parameter {unknown[0]!r}",
            where="--param",
            remedy=nearest(unknown[0], defaults)
            + (f"parameters: {', '.join(sorted(defaults))}" if defaults else "it has no parameters"),
        )
    resolved = resolve(name, defaults, given)
    _check_numbers(name, resolved, defaults)
    make = METHODS[name].run
    if make is None:
        return
    try:
        make(resolved)
    except ValueError as error:  # the parts of a method know what their numbers can be
        raise UsageError(
            f"method {name!r} cannot use these parameters: {error}",
            where="--param",
            remedy=f"`zsq methods show {name}` explains them; given: {', '.join(f'{key}={value}' for key, value in given.items())}",
        ) from error


def _check_numbers(method: str, resolved: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, value in resolved.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 1 if key in _AT_LEAST_ONE else 0 if defaults[key] >= 0 else -math.inf
        most = _AT_MOST.get(key, _MOST)
        if abs(value) > most and value != defaults[key]:
            raise UsageError(
                f"parameter {key!r} of method {method!r} cannot be {value:g}",
                where="--param",
                remedy=f"give a number of at most {most:g} (default: {defaults[key]!r})",
            )
        if key in _ABOVE_ZERO and value <= 0:
            raise UsageError(
                f"parameter {key!r} of method {method!r} cannot be {value:g}",
                where="--param",
                remedy=f"give a number above 0 (default: {defaults[key]!r})",
            )
        if not math.isfinite(value) or value < least:
            raise UsageError(
                f"parameter {key!r} of method {method!r} cannot be {value}",
                where="--param",
                remedy=f"give a number of {least:g} or more (default: {defaults[key]!r})"
                if math.isfinite(least)
                else f"give a finite number (default: {defaults[key]!r})",
            )


def check_device(device: str | None) -> None:
    """Refuse a device that there is not.

    Raises:
        UsageError: The name is no device, or the machine does not have it.
    """
    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"{device!r} is no device that images can be made on", where="--device", remedy="cpu, or cuda")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(
            f"there is no {device!r}: torch {torch.__version__} finds "
            + (f"{found} CUDA device{'s' if found > 1 else ''}" if found else "no CUDA device"),
            where="--device",
            remedy="leave --device out or say cpu; `zsq doctor` shows what there is",
        )


def _check_preprocess(model: Model) -> None:
    """The number of means has to fit the input's channels (see :meth:`zsq_deploy.model.Preprocess.apply`)."""
    shape = model.inputs[0].shape
    if len(shape) == 4 and shape[1]:
        model.preprocess.bounds(int(shape[1]))
