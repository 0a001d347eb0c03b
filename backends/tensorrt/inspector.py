"""What TensorRT's engine inspector says of a built engine: layers, their types, and the nodes of the network that they stand for.

The text is JSON, made with ``ProfilingVerbosity.DETAILED``; ``trtexec --exportLayerInfo`` writes the same. It changed over the versions:

* Types. Up to 10 a tensor has ``Format/Datatype``: a sentence in 8 (``Thirty-two wide channel vectorized row major Int8 format``), often
  one word in 10 (``Int8``, ``Half``, ``Float``). 11 splits it into ``Format`` and ``DataType``. Engines with open sizes say
  ``N/A due to dynamic shapes`` unless an execution context with shapes is given. Then the kernel's name (``TacticName``) is left, which
  spells its types: ``..._i8i8_i8i32_f32_...`` reads and multiplies 8-bit numbers and sums them up in 32 bits.
* Names. 8 joins the names of the nodes that it fused, with the weights' and Q/DQ nodes' among them: ``w + QuantizeLinear_7 + Conv_9 + PWN(Clip_10)``,
  and with ``||`` what it computes side by side. Parts that were handed to the compiler of 8 and 9 are one layer,
  ``{ForeignNode[first...last]}``, of which nothing else is said. From 8.6 on ``Metadata`` lists the nodes,
  ``[ONNX Layer: conv1]``, one after the other or with a control character (0x1e, 0x1f) between them.
* Layer types. ``CaskConvolution``, ``CaskGemmConvolution``, ``Reformat``, ... of the older kernels; ``kgen``, ``gemm``, ``correlation``,
  ``fusion``, ... of compiled ones, whose names end in ``_myl0_7``, and whose weights are among ``Constants``.

Sources: NVIDIA's developer guide (Engine Inspector) of 8.6, 10.16 and 11.4 and its page on what changed from 10 to 11; layer files that
NVIDIA publishes with its engine explorer, and those in public issues of github.com/NVIDIA/TensorRT (3737, 4020, 4397).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zsq_deploy.errors import EngineError

__all__ = ["Layer", "Tensor", "kernel_types", "read_layers"]

_TYPES = (
    ("int8", r"\bint8\b|\bi8\b"),
    ("int4", r"\bint4\b"),
    ("fp8", r"\bfp8\b|\be4m3\b"),
    ("fp4", r"\bfp4\b"),
    ("bfloat16", r"\bbf16\b|\bbfloat16\b"),
    ("float16", r"\bfp16\b|\bhalf\b|\bfloat16\b"),
    ("float32", r"\bfp32\b|\bfloat\b|\bfloat32\b"),
    ("int64", r"\bint64\b"),
    ("int32", r"\bint32\b"),
    ("uint8", r"\buint8\b"),
    ("bool", r"\bbool\b"),
)
_WORD = "(i8|i4|u8|i32|f16|bf16|tf32|f32|f64|e4m3|e5m2|e2m1)"
_XMMA = re.compile(f"(?:^|_){_WORD}{_WORD}_{_WORD}{_WORD}_{_WORD}(?:_|$)")
"""Types in the names of NVIDIA's newer kernels: input, output, weights, sum, last step."""

_OLDER_8_BIT = re.compile(r"(?:^|_)(?:int8x4|int8x32|imma|i8816|i16832|int8)(?:_|$|cudnn)", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")
_REGION = re.compile(r"\{ForeignNode\[(.*?)\.\.\.(.*?)\]\}")
_COMPILED = re.compile(r"_myl\d+_\d+$")
_PROFILE = re.compile(r"\s*\[profile (\d+)\]$")
_PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrix|fullyconnected|correlation|mha|attention|_fc|^fc", re.IGNORECASE)
_NO_WORK = ("NoOp", "Constant", "constant", "signal", "wait")


@dataclass(frozen=True)
class Tensor:
    """What a layer reads or writes.

    Attributes:
        name: TensorRT's name.
        shape: Its sizes; -1 where they are open.
        dtype: ``int8``, ``float32``, ...; empty where the inspector does not say it.
        form: The memory layout in the inspector's words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name; the profiler uses the same.
        kind: ``LayerType``.
        inputs: Tensors that it reads; constants are not among them.
        outputs: Tensors that it writes.
        weights: Type of its weights; empty where it has none or the inspector does not say it.
        kernel: Name of the kernel (``TacticName``); may be empty.
        nodes: Names of nodes of the ONNX file that it stands for, as the metadata lists them.
        origin: Why TensorRT added the layer, where it did: ``REFORMAT``, ``QDQ``.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: str
    kernel: str
    nodes: tuple[str, ...]
    origin: str

    @property
    def works(self) -> bool:
        """Whether it executes anything."""
        return self.kind not in _NO_WORK

    @property
    def may_multiply(self) -> int:
        """How well it looks like convolutions or matrix products: 2 by its type or kernel, 1 compiled code, 0 not at all."""
        if not self.works or self.kind == "Reformat" or self.origin in ("REFORMAT", "QDQ"):
            return 0
        if _PRODUCT.search(self.kind) or _XMMA.search(self.kernel) or _PRODUCT.search(self.kernel):
            return 2
        return 1 if self.kind in ("kgen", "fusion", "Myelin", "ForeignNode") or self.is_region else 0

    @property
    def is_region(self) -> bool:
        """Whether it is a part of the network of which the inspector tells nothing but where it begins and ends."""
        return bool(_REGION.search(self.name))

    @property
    def integer(self) -> bool:
        """Whether it multiplies (or only moves) 8-bit integers.

        For what looks like a product: its kernel's name says so, or both its first input and its weights are 8 bits. For anything else:
        it reads and writes nothing but 8 bits.
        """
        if self.may_multiply == 2:
            types = kernel_types(self.kernel)
            if types:
                return types == ("int8", "int8")
            reads = [one.dtype for one in self.inputs if one.dtype]
            if reads[:1] != ["int8"]:
                return False
            if self.weights:
                return self.weights == "int8"
            # Nothing is said of the other factor: it is another input, or 8 bits would not come out.
            return (len(reads) > 1 and set(reads) == {"int8"}) or {one.dtype for one in self.outputs} == {"int8"}
        touched = {one.dtype for one in (*self.inputs, *self.outputs)}
        return touched == {"int8"}

    def stands_for(self, known: Mapping[str, int]) -> tuple[str, ...]:
        """Nodes of the network that it stands for, those of its metadata or of its name.

        Args:
            known: The network's nodes with their places in the order of execution.
        """
        named = [name for name in self.nodes if name in known]
        if not named:
            named = [name for name in _parts(self.name, known) if name in known]
        region = _REGION.search(self.name)
        if region is not None:
            ends = [known[name] for name in region.groups() if name in known]
            if len(ends) == 2:
                first, last = min(ends), max(ends)
                named = [*named, *(name for name, place in known.items() if first <= place <= last)]
        return tuple(dict.fromkeys(named))


def _parts(name: str, known: Collection[str]) -> list[str]:
    """Pieces of a fused layer's name that may be names of nodes."""
    name = _COMPILED.sub("", name)
    if name in known:
        return [name]
    found: list[str] = []
    for piece in re.split(r" \+ | \|\| ", name):
        found.append(piece)
        found.extend(part.removesuffix(")") for part in piece.replace("PWN(", "").rstrip(")").split(", "))
    return found


def kernel_types(kernel: str) -> tuple[str, str] | None:
    """What a kernel reads and what it multiplies that with, from its name: ``("int8", "int8")``; ``None`` if the name does not say.

    Newer kernels spell input, output, weights, sum and last step, as in ``i8f32_i8i32_f32``; older 8-bit ones only hold ``int8``,
    ``imma`` or the like.
    """
    found = _XMMA.search(kernel)
    if found is not None:
        words = {"i8": "int8", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "tf32": "float32", "e4m3": "fp8"}
        return words.get(found[1], found[1]), words.get(found[3], found[3])
    return ("int8", "int8") if _OLDER_8_BIT.search(kernel) else None


def read_layers(text: str, *, where: str = "engine inspector", profile: int = 0) -> list[Layer]:
    """The layers of an engine in the order of execution, from the inspector's JSON.

    Args:
        text: What the inspector, or ``trtexec --exportLayerInfo``, wrote.
        where: The file, for errors.
        profile: Of an engine with several optimization profiles, the one whose layers are wanted.

    Raises:
        EngineError: It is no such JSON, or the engine was built without details.
    """
    try:
        found = json.loads(text, strict=False)  # names may hold control characters
    except json.JSONDecodeError as error:
        raise EngineError(
            f"TensorRT's layer information is not JSON ({error})", where=where, remedy="export it again, as JSON"
        ) from error
    rows = found.get("Layers") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows:
        raise EngineError(
            "TensorRT's layer information lists no layers",
            where=where,
            remedy="build the engine with detailed profiling verbosity, and export all layers as JSON",
        )
    if any(not isinstance(row, dict) for row in rows):
        raise EngineError(
            "this engine tells only the names of its layers",
            where=where,
            remedy="build it with ProfilingVerbosity.DETAILED (trtexec --profilingVerbosity=detailed)",
        )
    layers = []
    for row in rows:
        name = str(row.get("Name", ""))
        tagged = _PROFILE.search(name)
        if (int(tagged[1]) if tagged else 0) == profile:
            layers.append(_layer(row, name))
    return layers


def _layer(row: Mapping[str, Any], name: str) -> Layer:
    weights: Mapping[str, Any] = next(
        (row[key] for key in ("Weights", "ConvWeights") if isinstance(row.get(key), dict)), {}
    )
    return Layer(
        name=name,
        kind=str(row.get("LayerType", "")),
        inputs=_tensors(row.get("Inputs")),
        outputs=_tensors(row.get("Outputs")),
        weights=_dtype(str(weights.get("Type", ""))) or _largest(_tensors(row.get("Constants"))),
        kernel=str(row.get("TacticName", "")),
        nodes=tuple(dict.fromkeys(_NODE.findall(str(row.get("Metadata", ""))))),
        origin=str(row.get("Origin", "")),
    )


def _largest(constants: Sequence[Tensor]) -> str:
    """The type of the largest constant of a compiled layer: its weights, beside scales and bias."""
    typed = [one for one in constants if one.dtype]
    return max(typed, key=lambda one: math.prod(one.shape)).dtype if typed else ""


def _tensors(rows: Any) -> tuple[Tensor, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return ()
    found = []
    for row in rows:
        if not isinstance(row, Mapping):
            continue
        form = str(row.get("Format/Datatype", row.get("Format", "")))
        told = next((str(row[key]) for key in ("DataType", "Datatype") if key in row), form)
        shape = row.get("Dimensions")
        found.append(
            Tensor(
                str(row.get("Name", "")),
                tuple(int(size) for size in shape) if isinstance(shape, list) else (),
                _dtype(told),
                form,
            )
        )
    return tuple(found)


def _dtype(text: str) -> str:
    """The type that a description names; empty if it names none."""
    lowered = text.lower()
    return next((name for name, pattern in _TYPES if re.search(pattern, lowered)), "")
