"""One network in two forms: the ONNX graph, and its torch twin, built from that graph with the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zsq_deploy.errors import ModelError, ZsqError
from zsq_deploy.model import checks
from zsq_deploy.model.clean import Cleaned, clean
from zsq_deploy.model.fold import BatchNorm, Folded, batch_norms, fold
from zsq_deploy.model.graph import Graph, TensorSpec
from zsq_deploy.model.normalize import inline_functions
from zsq_deploy.model.preprocess import Preprocess
from zsq_deploy.model.source import Loaded, Shapes, read_source
from zsq_deploy.model.upgrade import upgrade

if TYPE_CHECKING:
    from zsq_deploy.model.twin import Twin

__all__ = ["Model", "load_model"]


@dataclass(frozen=True)
class Model:
    """A network.

    Attributes:
        graph: Batch normalization is still there, exporter noise is not; operator set 17 to 21; stable, unique names.
        preprocess: How uint8 images become its input.
        name: Short name.
        source: As the user said it.
        dynamic_batch: Whether it takes any batch size.
        notes: What a user should know about how it was read, one sentence each.
        origin: Digest of the network that this one was made from by changing numbers but not the function (equalized weights); empty
            if it is as it was read. Images that were made for that network fit this one too.
    """

    graph: Graph
    preprocess: Preprocess = field(default_factory=Preprocess)
    name: str = "model"
    source: str = ""
    dynamic_batch: bool = True
    notes: tuple[str, ...] = ()
    origin: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what the network computes; loading the same source twice gives the same one."""
        return self.graph.digest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs; the batch is ``None`` where it is free."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs."""
        return self.graph.outputs

    def batch_norms(self) -> list[BatchNorm]:
        """All batch normalizations, in graph order."""
        return list(self._batch_norms)

    @cached_property
    def _batch_norms(self) -> tuple[BatchNorm, ...]:
        return tuple(batch_norms(self.graph))

    def twin(self, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> Twin:
        """A differentiable torch module that computes the graph, node for node (a new one with every call)."""
        from zsq_deploy.model.twin import Twin

        return Twin(self.graph, dtype=dtype, device=device)

    def folded(self) -> Folded:
        """The deployable form: batch normalization folded into the layers (computed once)."""
        return self._folded

    @cached_property
    def _folded(self) -> Folded:
        return fold(self.graph)


@contextmanager
def _step(doing: str, where: str) -> Iterator[None]:
    """No error of a library leaves :func:`load_model` as it is."""
    try:
        yield
    except ZsqError:
        raise
    except MemoryError as error:
        raise ModelError(
            f"there is not enough memory for {doing}",
            where=where,
            remedy="close other programs, or use a larger machine",
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"{doing} failed: {type(error).__name__}: {lines[0][:300] if lines else ''}",
            where=where,
            remedy="export the network again with a current exporter; if that does not help, report this file",
        ) from error


def load_model(
    source: str | Path | torch.nn.Module,
    *,
    path: str | Path | None = None,
    weights: str | Path | None = None,
    input_shape: Shapes | None = None,
    preprocess: Preprocess | None = None,
    name: str | None = None,
) -> Model:
    """Read a network from a torch module, a timm name, an ONNX file or an exported program.

    Args:
        source: ``module:callable``, ``timm:NAME``, a path to ``.onnx`` or ``.pt2``, or a ``torch.nn.Module``.
        path: Folder that ``module:callable`` is imported from.
        weights: ``.safetensors``, ``.pt`` or ``.pth`` file for a torch network.
        input_shape: Shape of the input with the batch in front (``(1, 3, 224, 224)``), or shapes by input name. Torch
            modules need it, and ONNX files that leave sizes other than the batch open.
        preprocess: How images become input; by default what timm names, else division by 255.
        name: Short name; by default taken from the source.

    Returns:
        The network, cleaned, with batch normalization kept and any batch size where that is possible (see
        ``dynamic_batch`` and ``notes``).

    Raises:
        UsageError: An option does not make sense, or one is missing.
        ModelError: The network cannot be read, exported or understood.
        UnsupportedOpError: It holds operators that the op table does not know; all of them are named.
    """
    where = (
        source
        if isinstance(source, str)
        else type(source).__name__
        if isinstance(source, torch.nn.Module)
        else str(source)
    )
    with _step("reading the network", where):
        loaded = read_source(source, path=path, weights=weights, input_shape=input_shape)
    with _step("bringing the file to a current operator set", where):
        proto = upgrade(inline_functions(loaded.proto), where=where)
    with _step("checking the weights", where):
        checks.check_numbers(proto, where=where)
    with _step("cleaning the graph", where):
        cleaned = clean(proto, None if loaded.module is not None else input_shape, where=where)
    with _step("checking the operators", where):
        checks.check_supported(Graph(cleaned.proto))
    with _step("running the network once", where):
        cleaned = _checked(cleaned, loaded)
    notes = [*loaded.notes, *cleaned.notes]
    if preprocess is None:
        preprocess = Preprocess()
        if loaded.normalization is not None:
            mean, std = loaded.normalization
            preprocess = Preprocess(mean=mean, std=std)
            notes.append(f"--mean {_text(mean)} and --std {_text(std)} were taken from timm")
    return Model(
        graph=Graph(cleaned.proto),
        preprocess=preprocess,
        name=name or loaded.name,
        source=loaded.source,
        dynamic_batch=cleaned.dynamic_batch,
        notes=tuple(notes),
    )


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _checked(cleaned: Cleaned, loaded: Loaded) -> Cleaned:
    """Compare with what is at hand: the exported batch size, and the torch module."""
    if cleaned.check is not None and not checks.batch_is_free(cleaned):
        note = "the batch size is fixed in this file: with another one it computes something else; it was left as it is"
        cleaned = replace(cleaned.check, notes=(*cleaned.notes, note))
    if loaded.module is not None:
        checks.same_as_module(cleaned, loaded.module, where=loaded.source)
    else:
        checks.check_runs(cleaned, where=loaded.source)
    return cleaned
