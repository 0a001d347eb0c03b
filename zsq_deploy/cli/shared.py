"""Groups of options that several commands share, with the words of the recipe that they set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.options import quantize as q
from zsq_deploy.cli.options import verify as v

__all__ = ["EVALUATION", "IMAGES", "MODEL", "QUANTIZATION", "RUN", "SEED", "Shared", "with_options"]


@dataclass(frozen=True)
class Shared:
    """One option that several commands have, and the word of the recipe that it sets.

    Attributes:
        name: Name of the parameter.
        kind: One of the annotated types above.
        default: Its default.
        word: Dotted word of the recipe.
    """

    name: str
    kind: Any
    default: Any
    word: str


def _shared(section: str, **options: tuple[Any, Any] | tuple[Any, Any, str]) -> tuple[Shared, ...]:
    """Options of one section; the word is the name of the option, unless a third value says it."""
    found = []
    for name, (kind, default, *word) in options.items():
        found.append(Shared(name, kind, default, f"{section}.{word[0] if word else name}"))
    return tuple(found)


_REQUIRED = inspect.Parameter.empty

MODEL = _shared(
    "model",
    model=(o.ModelArg, _REQUIRED, "source"),
    path=(o.PathOpt, None),
    weights=(o.WeightsOpt, None),
    input_shape=(o.ShapeOpt, None),
    mean=(o.MeanOpt, None),
    std=(o.StdOpt, None),
    raw_pixels=(o.RawOpt, False),
)
"""The network."""

IMAGES = _shared(
    "calibration",
    method=(o.MethodOpt, "zeroq"),
    images=(o.ImagesOpt, 256),
    time_limit=(o.TimeLimitOpt, None),
    param=(o.ParamOpt, None, "parameters"),
    device=(o.DeviceOpt, None),
    also=(o.AlsoOpt, None),
    workers=(o.WorkersOpt, 1),
    image_precision=(o.ImagePrecisionOpt, "float32", "precision"),
    compile=(o.CompileOpt, False),
)
"""How calibration images are made."""

QUANTIZATION = (
    *_shared("calibration", calibration=(o.SetOpt, None, "set")),
    *_shared(
        "quantization",
        bits=(q.BitsOpt, "w8a8"),
        protocol=(q.ProtocolOpt, "ends-8bit"),
        ranges=(q.RangesOpt, "auto"),
        bias_correction=(q.BiasOpt, True),
        rounding=(q.RoundingOpt, "nearest"),
        reconstruct_preset=(q.ReconstructOpt, "fast"),
        size_budget=(q.SizeBudgetOpt, None),
        equalize=(q.EqualizeOpt, False),
        exact_scales=(q.ExactOpt, True),
        float_type=(q.FloatTypeOpt, "float32"),
        float_macs=(q.FloatMacsOpt, None),
        search=(q.SearchOpt, True),
        exclude=(q.ExcludeOpt, None),
        compress_weights=(q.CompressOpt, None),
        quantizer=(q.QuantizerOpt, "auto"),
        preset=(q.PresetOpt, None, "vendor.preset"),
        model_type=(q.ModelTypeOpt, None, "vendor.model_type"),
        fast_bias=(q.FastBiasOpt, None, "vendor.fast_bias"),
        subset_size=(q.SubsetOpt, None, "vendor.subset_size"),
        ignore_name=(q.IgnoreNameOpt, None, "vendor.ignore_name"),
        ignore_type=(q.IgnoreTypeOpt, None, "vendor.ignore_type"),
        ignore_pattern=(q.IgnorePatternOpt, None, "vendor.ignore_pattern"),
        accuracy_control=(q.AccuracyControlOpt, False, "vendor.accuracy_control"),
        max_drop=(q.MaxLossOpt, None, "vendor.max_drop"),
        pot_config=(q.PotConfigOpt, None, "vendor.pot_config"),
        validation_data=(q.ValidationOpt, None),
    ),
    Shared("target", q.TargetOpt, ["ort-x86-vnni"], "targets"),
)
"""What is built, and how. Words of `vendor` go to the section of the chosen quantizer, see :func:`zsq_deploy.cli.words.vendor_words`."""

EVALUATION = (
    *_shared("verification", eval_data=(v.EvalOpt, None), limit=(v.LimitOpt, None), resize=(v.ResizeOpt, False)),
    *_shared(
        "verification.gates",
        min_agreement=(v.MinAgreementOpt, None),
        min_float_agreement=(v.MinFloatAgreementOpt, None),
        max_accuracy_drop=(v.MaxDropOpt, None),
        min_speedup=(v.MinSpeedupOpt, None),
        min_within_2_lsb=(v.MinLsbOpt, None),
        min_integer_macs=(v.MinMacsOpt, None),
        min_integer_equal=(v.MinEqualOpt, None),
        max_latency_ms=(v.MaxLatencyOpt, None),
    ),
)
"""What an engine is judged on."""

RUN = (SEED, THREADS) = _shared("run", seed=(o.SeedOpt, 0), threads=(o.ThreadsOpt, 1))
"""The run."""


def with_options(*options: Shared) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command shared options; it gets what they say as its first argument, `said`: dotted word of the recipe -> value.

    Typer reads a command's options from its signature, so the decorated function has one with the shared options in front.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.kind)
            for item in options
        ]

        @functools.wraps(command)
        def call(**given: Any) -> int:
            said = {item.word: given.pop(item.name) for item in options}
            return command(said, **given)

        parameters = [*added, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own)]
        call.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        return call

    return decorate
