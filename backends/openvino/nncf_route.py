"""The route through NNCF: ``nncf.quantize`` on the OpenVINO model of the folded float graph, fed by our calibration set.

NNCF decides what is quantized and with which ranges, and corrects biases. Weights stay float behind their FakeQuantize, so that
they are rounded once, at the scales that the engine really gets; NNCF's own finished IR (weights stored as integers) is written
beside it, as the vendor would ship it.

What NNCF is told by default differs from its own defaults where a measurement says so (``docs/openvino-nncf.md`` has the
numbers):

* **min/max ranges** over all images instead of the mean of the images' extremes: what the mean cuts off is the largest activations
  of every second image;
* **one scale an activation**, also in front of depthwise convolutions, which otherwise run in float;
* **no half-range weights** in the first layer on processors with VNNI, which cannot overflow;
* **full bias correction**, layer after layer behind layers that are corrected: in depthwise networks the largest single gain;
* **structured pictures** beside the synthetic images (`probes`), because images that match statistics are all alike in what a global
  pooling gives, and no range may be cut.
"""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import Target, ValidationData
from zsq_deploy.backends.openvino.convert import convert, first_line, read, save
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.ir import read_ir
from zsq_deploy.backends.openvino.nncf_accuracy import Metric, drop_of, quantized_operators, read_steps
from zsq_deploy.backends.openvino.nncf_scope import Ignored, ignored_operators, operators_of
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions
from zsq_deploy.backends.openvino.quiet import Messages, load_nncf, quiet
from zsq_deploy.backends.openvino.targets import DEVICE
from zsq_deploy.errors import CalibrationError, EngineError, UsageError, ZsqError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, TensorSpec
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import apply_biases

__all__ = ["Samples", "design_nncf", "given_graph", "prepare", "quantize_arguments"]

Array = npt.NDArray[Any]


def design_nncf(
    model: Any,
    calibration: Any,
    target: Target,
    options: BuildOptions,
    folder: Path,
    *,
    progress: Progress = SILENT,
    validation: ValidationData | None = None,
    probes: Mapping[str, Array] | None = None,
) -> Design:
    """Have NNCF quantize a network.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        calibration: The calibration set.
        target: What to quantize for.
        options: What is quantized; ``options.nncf`` says what NNCF is told. Given biases switch NNCF's bias correction off.
        folder: Where ``vendor.xml`` and ``vendor.bin`` go.
        progress: Watches; NNCF's own bars become tasks of it.
        validation: What accuracy control measures on; ``None``: the calibration set itself.
        probes: More images, appended to the set so that ranges are covered: input name -> array.

    Raises:
        CalibrationError: The set or the probes do not fit the network's inputs.
        UsageError: Something is to stay in float that does not exist.
        EngineError: NNCF gave up, or found nothing to quantize.
    """
    told = options.nncf
    graph = given_graph(model.folded().graph, options)
    samples = Samples(graph.inputs, calibration, probes, told.subset_size)
    ir = prepare(graph)
    parts = operators_of(ir, graph)
    ignored = ignored_operators(
        ir,
        graph,
        names=(*options.exclude, *told.ignored_names),
        types=told.ignored_types,
        patterns=told.ignored_patterns,
        op_types=options.op_types,
    )
    corrects = told.bias_correction and not options.biases
    metric = None
    if told.accuracy_control:
        metric = Metric(ir, validation or _on_calibration(calibration))
    record: dict[str, Any] = {
        "quantizer": "nncf",
        "version": str(load_nncf().__version__),
        "preset": told.preset,
        "model_type": told.model_type,
        "target_device": _device(told, target),
        "images": len(samples) - samples.probes,
        "probes": samples.probes,
        "bias_correction": ("fast" if told.fast_bias_correction else "full") if corrects else "off",
        "activations_range": told.activations_range,
        "weights_range": told.weights_range,
        "overflow_fix": _overflow_fix(told, target),
        "per_channel_activations": told.per_channel_activations,
        "ignored": dict(ignored.asked),
    }
    notes: list[str] = []
    with quiet(progress) as messages:
        quantized, full = _quantize(ir, samples, target, told, ignored, corrects, metric)
    if not quantized_operators(quantized):
        raise EngineError(
            "NNCF found nothing to quantize in this network",
            where="--quantizer nncf",
            remedy="leave fewer operators in float; a network without convolutions and matrix products cannot be quantized",
        )
    if metric is not None:
        record["accuracy_control"] = _controlled(metric, told, messages, full, quantized, parts)
        notes.append(_sentence(record["accuracy_control"]))
    record["operators_with_8_bit_inputs"] = len(quantized_operators(quantized))
    notes.extend(f"NNCF: {text}" for text in dict.fromkeys(messages.texts(logging.WARNING)) if _worth_saying(text))
    reading = read_ir(quantized, like=graph)
    notes.extend(reading.notes)
    vendor = Path(folder) / "vendor.xml"
    _compress(quantized)
    _name_by_place(quantized)
    save(quantized, vendor)
    return Design(reading.graph, vendor, corrects, record, tuple(notes))


# ---------------------------------------------------------------------------------------------------------------------
# what goes in
# ---------------------------------------------------------------------------------------------------------------------


def given_graph(graph: Graph, options: BuildOptions) -> Graph:
    """The float graph with the weights and biases that the options replace."""
    if options.weights:
        net = Net(graph.proto)
        for name, values in options.weights.items():
            old = net.constant(name)
            if old is None or old.shape != np.shape(values):
                raise UsageError(
                    f"{name!r} is no weight of this network with the shape {list(np.shape(values))}",
                    where="BuildOptions.weights",
                    remedy="take names and shapes from the folded graph's initializers",
                )
            net.add_constant(name, np.asarray(values, old.dtype), exact=True)
        net.touch()
        net.sweep()
        graph = Graph(net.proto())
    return apply_biases(graph, options.biases) if options.biases else graph


def prepare(graph: Graph) -> Any:
    """The ``openvino.Model`` of a float graph as NNCF and POT want it: as OpenVINO's own converter simplifies it.

    Without its simplifications NNCF does not recognize a bias behind the shape arithmetic that OpenVINO's reader puts there, and
    corrects none.
    """
    return convert(graph)


class Samples:
    """The images that NNCF sees, one at a time: the set (or its first part), then the probes.

    Args:
        inputs: The network's inputs.
        calibration: The calibration set.
        probes: More images: input name -> array, first axis = images.
        count: How many images of the set are taken; ``None``: all. Probes come on top.

    Attributes:
        probes: How many probes there are.

    Raises:
        CalibrationError: Names, shapes or types that do not fit the network.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        calibration: Any,
        probes: Mapping[str, Array] | None = None,
        count: int | None = None,
    ) -> None:
        if calibration is None:
            raise CalibrationError(
                "NNCF reads a calibration set, and none was given",
                where="--quantizer nncf",
                remedy="take a synthesis method that makes images, or --quantizer qdq",
            )
        where = str(getattr(calibration, "folder", None) or f"calibration set ({calibration.manifest.method})")
        _check(inputs, {name: (None, *shape) for name, shape in calibration.shapes.items()}, where)
        types = calibration.manifest.dtypes
        for spec in inputs:
            if np.dtype(types[spec.name]) != spec.dtype:
                raise CalibrationError(
                    f"input {spec.name!r} is {types[spec.name]} in the set and {spec.dtype} in the network",
                    where=where,
                    remedy="make a set for this network with `zsq synth`",
                )
        if probes is not None:
            _check(inputs, {name: (None, *np.shape(value)[1:]) for name, value in probes.items()}, "probes")
        self._calibration = calibration if count is None else calibration.take(0, min(count, len(calibration)))
        self._types = {spec.name: spec.dtype for spec in inputs}
        self._probes = probes or {}
        self.probes = len(next(iter(self._probes.values()))) if self._probes else 0

    def __len__(self) -> int:
        return len(self._calibration) + self.probes

    def __iter__(self) -> Iterator[dict[str, Array]]:
        yield from self._calibration.batches(1)
        for row in range(self.probes):
            yield {
                name: np.ascontiguousarray(value[row : row + 1], self._types[name])
                for name, value in self._probes.items()
            }


def _check(inputs: tuple[TensorSpec, ...], given: Mapping[str, tuple[int | None, ...]], where: str) -> None:
    wanted = {spec.name: spec.shape for spec in inputs}
    if set(wanted) != set(given):
        raise CalibrationError(
            f"the set has the inputs {sorted(given)}, the network has {sorted(wanted)}",
            where=where,
            remedy="make a set for this network with `zsq synth`",
        )
    for name, shape in wanted.items():
        have = given[name][1:]
        if len(have) != len(shape) - 1 or any(b is not None and a != b for a, b in zip(have, shape[1:], strict=True)):
            raise CalibrationError(
                f"one sample of input {name!r} has the shape {list(have)} in the set and {list(shape[1:])} in the network",
                where=where,
                remedy="make the set with the network's own --input-shape",
            )


def _on_calibration(calibration: Any) -> ValidationData:
    method = str(calibration.manifest.method)
    kind = "the real images" if method == "real" else f"the synthetic images ({method})"
    return ValidationData(list(calibration.batches(1)), None, f"{kind} that also calibrated")


# ---------------------------------------------------------------------------------------------------------------------
# NNCF
# ---------------------------------------------------------------------------------------------------------------------


def _device(told: NncfOptions, target: Target) -> str:
    return told.target_device or str(target.session.get(DEVICE, "ANY"))


def _overflow_fix(told: NncfOptions, target: Target) -> str | None:
    """What the user says; ``disable`` for a target that asks for VNNI, whose sums cannot saturate; else NNCF's own choice."""
    if told.overflow_fix is not None:
        return told.overflow_fix
    return "disable" if any("vnni" in feature for feature in target.requires) else None


def _estimator(name: str | None, quantile: float) -> Any:
    ranges = importlib.import_module("nncf.quantization.range_estimator")
    if name is None:
        return ranges.RangeEstimatorParameters()
    plain = getattr(ranges.RangeEstimatorParametersSet, name.upper())

    def collector(given: Any) -> Any:
        return ranges.StatisticsCollectorParameters(
            statistics_type=given.statistics_type,
            aggregator_type=given.aggregator_type,
            quantile_outlier_prob=quantile,
        )

    return ranges.RangeEstimatorParameters(min=collector(plain.min), max=collector(plain.max))


def _advanced(told: NncfOptions, target: Target, corrects: bool) -> Any:
    """NNCF's ``AdvancedQuantizationParameters``."""
    parameters = importlib.import_module("nncf.quantization.advanced_parameters")
    backend = importlib.import_module("nncf.openvino.quantization.backend_parameters").BackendParameters
    smooth = parameters.AdvancedSmoothQuantParameters()
    if told.smooth_quant_alpha is not None:
        smooth.matmul = told.smooth_quant_alpha
    if told.smooth_quant_convolution_alpha is not None:
        smooth.convolution = told.smooth_quant_convolution_alpha
    fix = _overflow_fix(told, target)
    return parameters.AdvancedQuantizationParameters(
        overflow_fix=None if fix is None else parameters.OverflowFix(fix),
        disable_bias_correction=not corrects,
        activations_quantization_params=None
        if told.per_channel_activations
        else parameters.QuantizationParameters(per_channel=False),
        activations_range_estimator_params=_estimator(told.activations_range, told.range_quantile),
        weights_range_estimator_params=_estimator(told.weights_range, told.range_quantile),
        smooth_quant_alphas=smooth,
        backend_params={backend.COMPRESS_WEIGHTS: False},
    )


def quantize_arguments(
    told: NncfOptions, target: Target, count: int, *, ignored: Iterable[str] = (), corrects: bool = True
) -> dict[str, Any]:
    """The keywords of ``nncf.quantize``.

    Args:
        told: What NNCF is told.
        target: What to quantize for.
        count: Number of images.
        ignored: Names of operators of the OpenVINO model that stay in float.
        corrects: Let NNCF correct the biases.
    """
    nncf = load_nncf()
    names = list(ignored)
    return {
        "preset": None if told.preset is None else nncf.QuantizationPreset(told.preset),
        "target_device": nncf.TargetDevice(_device(told, target)),
        "subset_size": count,
        "fast_bias_correction": told.fast_bias_correction,
        "model_type": None if told.model_type is None else nncf.ModelType(told.model_type),
        "ignored_scope": nncf.IgnoredScope(names=names) if names else None,
        "advanced_parameters": _advanced(told, target, corrects),
    }


def _quantize(
    ir: Any,
    samples: Samples,
    target: Target,
    told: NncfOptions,
    ignored: Ignored,
    corrects: bool,
    metric: Metric | None,
) -> tuple[Any, Any]:
    """The quantized model with float weights; and the one from which accuracy control began, ``None`` without it."""
    nncf = load_nncf()
    common = quantize_arguments(told, target, len(samples), ignored=ignored.operators, corrects=corrects)
    advanced = common.pop("advanced_parameters")
    dataset = nncf.Dataset(samples)
    if metric is None:
        return _run(lambda: nncf.quantize(ir, dataset, advanced_parameters=advanced, **common)), None
    control = importlib.import_module("nncf.quantization.advanced_parameters").AdvancedAccuracyRestorerParameters
    with tempfile.TemporaryDirectory(prefix="zsq-nncf-") as scratch:
        restorer = control(
            tune_hyperparams=told.tune_parameters,
            ranking_subset_size=min(told.ranking_subset_size or len(metric.items), len(metric.items)),
            num_ranking_workers=1,
            intermediate_model_dir=scratch,
            **({} if told.max_iterations is None else {"max_num_iterations": told.max_iterations}),
        )
        quantized = _run(
            lambda: nncf.quantize_with_accuracy_control(
                ir,
                dataset,
                nncf.Dataset(metric.items, lambda item: item.feeds),
                metric,
                max_drop=told.max_drop,
                drop_type=nncf.DropType(told.drop_type),
                advanced_quantization_parameters=advanced,
                advanced_accuracy_restorer_parameters=restorer,
                **common,
            )
        )
        return quantized, read(Path(scratch) / "intermediate_model.xml").clone()


def _run(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (KeyboardInterrupt, MemoryError, ZsqError):
        raise
    except Exception as error:  # NNCF and OpenVINO raise whatever they like
        raise EngineError(
            f"NNCF gave up: {first_line(error)}",
            where="--quantizer nncf",
            remedy="keep the operator that the message names in float (--exclude), or take --quantizer qdq",
        ) from error


def _compress(quantized: Any) -> None:
    """Store the weights as integers, in place, exactly as ``nncf.quantize`` does when it is not told to leave them."""
    importlib.import_module("openvino._offline_transformations").compress_quantize_weights_transformation(quantized)


def _name_by_place(ir: Any) -> None:
    """Name what has no name of its own after its place: OpenVINO numbers it with a counter of the process, and equal builds would differ."""
    for place, operator in enumerate(ir.get_ordered_ops()):
        kind = operator.get_type_name()
        if re.fullmatch(rf"{re.escape(kind)}_\d+", operator.get_friendly_name()):
            operator.set_friendly_name(f"{kind}_of_place_{place}")


# ---------------------------------------------------------------------------------------------------------------------
# what came out
# ---------------------------------------------------------------------------------------------------------------------


def _controlled(
    metric: Metric, told: NncfOptions, messages: Messages, full: Any, final: Any, parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """What accuracy control did, as JSON: the metric, its values, and each layer that went back to float with the reason."""
    nodes = {operator: node for node, operators in parts.items() for operator in operators}
    reverted = quantized_operators(full) - quantized_operators(final)
    before, after = metric.of(full), metric.of(final)
    drop = drop_of(metric.floating, before, told.drop_type)
    layers: dict[str, str] = {}
    for step in read_steps(messages.texts()):
        # NNCF gives no number for the step behind which nothing was missing any more.
        left = step.drop if step.drop is not None else drop_of(metric.floating, after, told.drop_type)
        for operator in sorted(step.operators):  # NNCF's own order is that of a set
            if operator in reverted:
                layers[nodes.get(operator, operator)] = (
                    f"with it in 8 bits the metric was {drop:.4f} below the float network's, without it {left:.4f}"
                )
        drop = left
    for operator in sorted(reverted):
        layers.setdefault(nodes.get(operator, operator), "it reads or is read by what went back to float")
    return {
        "metric": metric.name,
        "samples": len(metric.items),
        "max_drop": told.max_drop,
        "drop_type": told.drop_type,
        "float": metric.floating,
        "quantized": before,
        "final": after,
        "reached": drop_of(metric.floating, after, told.drop_type) <= told.max_drop + 1e-9,
        "returned_to_float": layers,
    }


def _sentence(control: Mapping[str, Any]) -> str:
    layers = control["returned_to_float"]
    what = (
        f"{len(layers)} layer{'s' * (len(layers) > 1)} went back to float"
        if layers
        else "no layer had to go back to float"
    )
    missed = "" if control["reached"] else f"; the allowed drop of {control['max_drop']:g} was not reached"
    return f"accuracy control ({control['metric']}): {what}{missed}"


def _worth_saying(text: str) -> bool:
    return "subset size" not in text and "deprecat" not in text.lower()
