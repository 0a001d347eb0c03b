"""What has to be true of a network before anything is built on it."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from zsq_deploy.errors import ModelError, UnsupportedOpError
from zsq_deploy.model.clean import Cleaned
from zsq_deploy.model.editing import is_default
from zsq_deploy.model.graph import Graph

__all__ = ["batch_is_free", "check_numbers", "check_runs", "check_supported", "same_as_module"]

_WEIGHTED = (
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
)
_SHOWN = 5


def check_numbers(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse weights that are not finite.

    Infinities are allowed where no layer multiplies with them (attention masks are made of them); NaN is allowed nowhere.

    Raises:
        ModelError: Names the tensors.
    """
    layers: dict[str, list[str]] = {}
    variances: dict[str, float] = {}
    for node in proto.graph.node:
        if is_default(node, *_WEIGHTED):
            for name in node.input:
                layers.setdefault(name, []).append(node.name)
        if is_default(node, "BatchNormalization") and len(node.input) > 4:
            epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
            variances[node.input[4]] = epsilon
    bad: list[str] = []
    for tensor in proto.graph.initializer:
        try:
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelError(
                f"the tensor {tensor.name!r} is damaged ({error})", where=where, remedy="copy or export the file again"
            ) from error
        if array.dtype.kind != "f":
            continue
        used = f" (used by {layers[tensor.name][0]})" if tensor.name in layers else ""
        if np.isnan(array).any():
            bad.append(f"{tensor.name}{used}: {int(np.isnan(array).sum())} of {array.size} are NaN")
        elif used and np.isinf(array).any():
            bad.append(f"{tensor.name}{used}: {int(np.isinf(array).sum())} of {array.size} are infinite")
        elif tensor.name in variances and (array + variances[tensor.name] <= 0).any():
            bad.append(f"{tensor.name}{used}: a running variance that is negative")
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ModelError(
            f"the network has weights that are no usable numbers: {'; '.join(bad[:_SHOWN])}{more}",
            where=where,
            remedy="use an earlier checkpoint: training has diverged, or the file was damaged",
        )


def check_supported(graph: Graph) -> None:
    """Refuse operators that the op table does not know, all at once.

    Raises:
        UnsupportedOpError: Names every operator with its places.
    """
    from zsq_deploy.model.ops import check_supported as check

    check(graph)


def _run(proto: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """The outputs of a model on its torch twin, or ``None`` where the op table is not enough."""
    from zsq_deploy.model.twin import Twin

    try:
        twin = Twin(Graph(proto), device="cpu")
        with torch.no_grad():
            found = twin.run(feeds)
    except UnsupportedOpError:
        return None
    return [found[name] for name in twin.output_names]


def example(cleaned: Cleaned, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs; integer inputs get zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    feeds: dict[str, torch.Tensor] = {}
    for spec in Graph(cleaned.proto).inputs:
        shape = tuple(batch if axis == 0 and size is None else size or 1 for axis, size in enumerate(spec.shape))
        if spec.dtype.kind == "f":
            feeds[spec.name] = torch.rand(shape, generator=generator)
        else:
            kind = torch.from_numpy(np.zeros(1, spec.dtype)).dtype
            feeds[spec.name] = torch.randint(0, 2, shape, generator=generator).to(kind)
    return feeds


def check_runs(cleaned: Cleaned, *, where: str) -> None:
    """Run a network once on random input, so that layers that do not fit together are found now.

    Raises:
        ModelError: It does not run.
    """
    try:
        _run(cleaned.proto, example(cleaned, 1))
    except Exception as error:
        lines = str(error).strip().splitlines()
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in example(cleaned, 1).items())
        raise ModelError(
            f"the network does not run on input {shapes}: {lines[0][:300] if lines else type(error).__name__}",
            where=where,
            remedy="check --input-shape; if it is right, the file contradicts itself: export the network again",
        ) from error


def same_as_module(cleaned: Cleaned, module: torch.nn.Module, *, where: str) -> None:
    """Compare an exported network with the module that it came from, on random inputs.

    Raises:
        ModelError: The outputs differ by more than a thousandth of the largest one: the export went wrong.
    """
    batch = 2 if cleaned.dynamic_batch else 1
    for sign in (1, -1):  # code that looks at its input often looks at the sign
        feeds = {
            name: sign * value if value.is_floating_point() else value
            for name, value in example(cleaned, batch, seed=sign + 1).items()
        }
        found = _run(cleaned.proto, feeds)
        if found is None:
            return
        with torch.no_grad():
            wanted = [value for value in _flat(module(*feeds.values())) if value.is_floating_point()]
        if len(wanted) != len(found):
            return  # outputs that are no tensors: nothing to line up
        for spec, one, other in zip(Graph(cleaned.proto).outputs, found, wanted, strict=True):
            largest = other.abs().max().item() if other.numel() else 0.0
            if one.shape != other.shape or (one - other).abs().max().item() > 1e-3 * max(largest, 1e-6):
                raise ModelError(
                    f"torch's export computes something else than the network itself (output {spec.name!r})",
                    where=where,
                    remedy="look for Python code in forward() that depends on the input; "
                    "export the network to ONNX and give the file",
                )


def _flat(value: object) -> list[torch.Tensor]:
    """All tensors of nested outputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _flat(item)]
    return []


def batch_is_free(cleaned: Cleaned) -> bool:
    """Whether a network whose batch size was freed computes every sample as the exported network does."""
    assert cleaned.check is not None
    exported = Graph(cleaned.check.proto).inputs
    size = next(spec.shape[0] for spec in exported if spec.shape and spec.shape[0] is not None)
    feeds = example(cleaned, 2 * size)
    together = _run(cleaned.proto, feeds)
    halves = [
        _run(cleaned.check.proto, {name: value[start : start + size] for name, value in feeds.items()})
        for start in (0, size)
    ]
    if together is None or halves[0] is None or halves[1] is None:
        return True  # the missing operator is reported by check_supported
    for both, first, second in zip(together, halves[0], halves[1], strict=True):
        expected = torch.cat([first, second])
        if both.shape != expected.shape:
            return False
        largest = expected.double().abs().max().item() if expected.numel() else 0.0
        if expected.numel() and (both.double() - expected.double()).abs().max().item() > 1e-4 * max(largest, 1e-12):
            return False
    return True
