"""Weight-only compression by ``nncf.compress_weights``: smaller files, arithmetic in float32.

For networks of matrix products (transformers) whose activations are better left alone. What NNCF really does, whatever is asked for:
only matrix products and embeddings get 4 bits (and of those by default not the last one); convolutions are stored in 8 bits at best.
The engine multiplies in float32: OpenVINO's CPU plugin would otherwise also round the activations of such products to 8 bits, group
by group, while it runs (``DYNAMIC_QUANTIZATION_GROUP_SIZE``), and compute something else than its reference; the option is therefore
switched off in the file itself.
"""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.openvino.convert import first_line, save
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.ir import ir_to_qdq
from zsq_deploy.backends.openvino.nncf_route import given_graph, prepare
from zsq_deploy.backends.openvino.nncf_scope import operators_of
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quiet import load_nncf, quiet
from zsq_deploy.errors import EngineError
from zsq_deploy.progress import SILENT, Progress

__all__ = ["compress", "design_weight_only", "stored_types"]

_RUNTIME_OPTIONS = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
_LARGE = 64
"""Constants with fewer numbers are scales, shapes and the like."""


def compress(ir: Any, mode: str, *, group_size: int | None = None, progress: Progress = SILENT) -> Any:
    """Compress the weights of an OpenVINO model; the activations stay float, also at run time.

    Args:
        ir: The float ``openvino.Model``; it may be changed.
        mode: ``int8_sym``, ``int8_asym``, ``int4_sym`` or ``int4_asym``.
        group_size: 4 bits only: numbers along the summed axis that share a scale; -1: one scale a channel; ``None``: NNCF's choice.
        progress: Watches.

    Raises:
        EngineError: NNCF gave up.
    """
    nncf = load_nncf()
    told: dict[str, Any] = {"mode": nncf.CompressWeightsMode(mode)}
    if mode.startswith("int4"):
        advanced = importlib.import_module("nncf.quantization.advanced_parameters")
        told["all_layers"] = True
        # Matrices that the group size does not divide get smaller groups, and 8 bits where none fits.
        told["advanced_parameters"] = advanced.AdvancedCompressionParameters(
            group_size_fallback_mode=advanced.GroupSizeFallbackMode.ADJUST
        )
        if group_size is not None:
            told["group_size"] = group_size
    with quiet(progress):
        try:
            done = nncf.compress_weights(ir, **told)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # NNCF and OpenVINO raise whatever they like
            raise EngineError(
                f"NNCF could not compress the weights: {first_line(error)}",
                where=f"mode {mode}" + ("" if group_size is None else f", groups of {group_size}"),
                remedy="take another mode or group size, or quantize with --bits w8a8",
            ) from error
    done.set_rt_info("0", _RUNTIME_OPTIONS)
    return done


def stored_types(ir: Any) -> dict[str, int]:
    """How many numbers of an OpenVINO model's constants are stored in each element type (small constants left out)."""
    found: Counter[str] = Counter()
    for node in ir.get_ops():
        if node.get_type_name() == "Constant":
            count = int(np.prod(list(node.get_output_shape(0))))
            if count >= _LARGE:
                found[str(node.get_element_type().get_type_name())] += count
    return dict(found)


def design_weight_only(
    model: Any, target: Target, options: BuildOptions, folder: Path, *, progress: Progress = SILENT
) -> Design:
    """A network with compressed weights and float activations.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        target: What to build for.
        options: ``bits`` (``w8a32`` or ``w4a32``), or a mode in ``compress_weights``; biases and weights are put in before.
        folder: Where ``vendor.xml`` and ``vendor.bin`` go: the engine as it will run.
        progress: Watches.

    Raises:
        EngineError: NNCF gave up, or found no weight that it could compress.
    """
    del target
    mode = options.weight_only or "int8_sym"
    graph = given_graph(model.folded().graph, options)
    ir = prepare(graph)
    nodes = {operator: node for node, operators in operators_of(ir, graph).items() for operator in operators}
    done = compress(ir, mode, group_size=options.nncf.group_size, progress=progress)
    types = stored_types(done)
    narrow = sum(count for kind, count in types.items() if kind in ("i4", "u4"))
    compressed = narrow + sum(count for kind, count in types.items() if kind in ("i8", "u8"))
    if not compressed:
        raise EngineError(
            "NNCF found no weight that it could compress in this network",
            where=f"--bits {options.bits}",
            remedy="weight-only compression is for matrix products; quantize with --bits w8a8",
        )
    convolutions = [
        nodes.get(node.get_friendly_name(), node.get_friendly_name())
        for node in done.get_ordered_ops()
        if "Convolution" in node.get_type_name()
    ]
    notes = [
        f"weights only ({mode}): {compressed / sum(types.values()):.1%} of the stored numbers are integers, arithmetic is float32"
    ]
    if mode.startswith("int4") and convolutions:
        notes.append(
            f"NNCF keeps convolutions at 8 bit: {len(convolutions)} of them here; 4 bits are {narrow / compressed:.1%} of the integers"
        )
    qdq = ir_to_qdq(done, like=graph)
    vendor = Path(folder) / "vendor.xml"
    save(done, vendor)
    record = {
        "quantizer": "nncf.compress_weights",
        "version": str(load_nncf().__version__),
        "mode": mode,
        "group_size": options.nncf.group_size,
        "stored_numbers": types,
        "convolutions_in_8_bits": convolutions if mode.startswith("int4") else [],
    }
    return Design(qdq, vendor, False, record, tuple(notes))
