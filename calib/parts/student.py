"""The network as a simulated integer one would see images: for methods that look at what quantization changes (SADAG).

Round to nearest on the folded graph, weights per output channel, activations per tensor with the ranges of the images at hand that lose the least; the input
and what the last product reads keep 8 bits. It is a Q/DQ graph, and its twin has straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.recipe import Preparation
from zsq_deploy.calib.parts.rounding import rounded_twin
from zsq_deploy.calib.parts.terms.base import Context
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Graph, Twin
from zsq_deploy.quant.qdq import PlacementRules, insert_qdq
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.search import search
from zsq_deploy.quant.statistics import collect

__all__ = ["STUDENT", "Student", "last_product", "quantized_student"]

#: Name under which the student's graph is prepared: its ONNX bytes, uint8.
STUDENT = "student"

_PRODUCTS = ("Gemm", "MatMul", "Conv")


def quantized_student(weights: int, activations: int) -> Callable[[Preparation], Mapping[str, Tensor]]:
    """For `Recipe.prepare`: a student of so many bits, its ranges from the images of the stage before."""

    def prepare(preparation: Preparation) -> dict[str, Tensor]:
        context = preparation.context
        graph = context.model.folded().graph
        fixed = None if context.model.dynamic_batch else int(context.spec.shape[0] or 1)

        def batches() -> Iterator[Mapping[str, np.ndarray[Any, Any]]]:
            for batch in preparation.previous:
                yield {context.spec.name: batch["images"].numpy()}

        seen = collect(graph, batches(), micro_batch=fixed or 16, device=context.device, progress=preparation.progress)
        scheme = Scheme(activations, signed=False, symmetric=False)
        eight = Scheme(8, signed=False, symmetric=False)
        fine = {context.spec.name}
        last = last_product(graph)
        if last is not None:
            fine.add(last.input[0])
        ranges = {
            name: search(tensor.histogram, "mse", eight if name in fine else scheme) for name, tensor in seen.items()
        }
        student = insert_qdq(
            graph,
            ranges,
            activation=scheme,
            weight=Scheme(weights, granularity=Granularity.CHANNEL),
            rules=PlacementRules(round_outputs="read"),
            weight_method="mse",
            schemes=dict.fromkeys(fine, eight),
        )
        data = np.frombuffer(student.proto.SerializeToString(), np.uint8).copy()
        return {STUDENT: torch.from_numpy(data)}

    return prepare


def last_product(graph: Graph) -> onnx.NodeProto | None:
    """The product that makes the class scores, or the last one on the way to them."""
    labels = find_labels(graph, graph.outputs)
    node = None if labels is None else graph.producer(labels.value)
    while node is not None and node.op_type not in _PRODUCTS:
        node = graph.producer(node.input[0])
    return node


@dataclass(frozen=True)
class Answer:
    """What teacher and student make of images.

    Attributes:
        features: What the student's last product reads, pooled over space, of length 1 [N, F].
        residuals: Teacher's minus student's class scores [N, C].
    """

    features: Tensor
    residuals: Tensor


class Student:
    """The prepared student of a network, beside the network.

    Args:
        context: What was prepared by :func:`quantized_student`; the network is a classifier.
    """

    def __init__(self, context: Context) -> None:
        assert context.labels is not None
        graph = Graph(onnx.load_from_string(context.prepared[STUDENT].cpu().numpy().tobytes()))
        labels, last = find_labels(graph, graph.outputs), last_product(graph)
        if labels is None or last is None:
            raise CalibrationError(
                f"no Conv, Gemm or MatMul was found on the way to the class scores {context.labels.value!r}, so there is no last layer whose "
                "gradient could be looked at",
                where=context.model.name,
                remedy="use another method, such as genie",
            )
        self._scores, self._features = labels.value, last.input[0]
        self._input = context.spec.name
        self._student, self._rounded = rounded_twin(graph, context.dtype, context.device)
        teacher = context.model.folded().graph
        found = find_labels(teacher, teacher.outputs)
        assert found is not None
        self._teacher, self._teacher_scores = Twin(teacher, dtype=context.dtype, device=context.device), found.value

    def look(self, images: Tensor, scores: Tensor | None = None) -> Answer:
        """Teacher and student on images.

        Args:
            images: In the network's input space.
            scores: The teacher's class scores, if they are known already.
        """
        if scores is None:
            scores = self._teacher.run({self._input: images}, fetch=(self._teacher_scores,))[self._teacher_scores]
        fetch = (self._scores, self._features)
        found = self._student.run({self._input: images}, fetch=fetch, taps=self._rounded)
        features = found[self._features]
        if features.dim() > 2:
            features = features.flatten(2).mean(2)
        return Answer(features, scores.flatten(1) - found[self._scores].flatten(1))
