"""Reading ONNX files that anybody may have made: what is wrong with one is said in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import external_data_helper

from zsq_deploy.errors import ModelError, UnsupportedOpError

__all__ = ["read_onnx", "signature"]

_TWO_GIB = 2**31 - 1


def signature(path: Path) -> str:
    """What the first bytes of a file say it is: ``zip``, ``pickle``, ``hdf5``, ``text``, ``empty`` or ``other``."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head.startswith(b"\x89HDF"):
        return "hdf5"
    return "text" if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head) else "other"


_NOT_ONNX = {
    "empty": ("the file is empty", "copy or export it again"),
    "zip": (
        "this is not an ONNX file but a zip archive, as PyTorch writes them",
        "give the network as module:callable with --weights FILE, or rename an exported program to .pt2",
    ),
    "pickle": (
        "this is not an ONNX file but a Python pickle, which can run code when it is read; it was not opened",
        "give the network as module:callable with --weights FILE (a state_dict), or export it to ONNX",
    ),
    "hdf5": ("this is not an ONNX file but HDF5, as Keras writes it", "export the network with tf2onnx"),
    "text": (
        "this is not an ONNX file but text",
        "give the binary .onnx file (a Git LFS pointer has to be fetched first)",
    ),
}


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        ModelError: The file is missing, empty, truncated or of another format, or its external data are missing, too short
            or outside of its folder.
    """
    where = str(path)
    if not path.exists():
        raise ModelError("the file does not exist", where=where, remedy="check the path")
    if path.is_dir():
        raise ModelError("this is a folder, not an ONNX file", where=where, remedy="give the .onnx file inside it")
    try:
        kind = signature(path)
        if kind in _NOT_ONNX:
            what, remedy = _NOT_ONNX[kind]
            raise ModelError(what, where=where, remedy=remedy)
        proto = onnx.load(where, load_external_data=False)
    except OSError as error:
        raise ModelError(
            f"the file cannot be read ({error.strerror})", where=where, remedy="check permissions"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # protobuf has its own error types, and they differ between its implementations
        raise _damaged(where) from error
    if not proto.ir_version or not proto.graph.node:
        raise _damaged(where)
    _load_external(proto, path)
    _check(proto, where)
    return proto


def _damaged(where: str) -> ModelError:
    return ModelError(
        "the file is damaged or is not an ONNX file: it cannot be decoded",
        where=where,
        remedy="copy or export it again; compare its size with the original's",
    )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph, in attributes and branches as well."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _load_external(proto: onnx.ModelProto, path: Path) -> None:
    """Load tensors that are stored beside the file, and only there."""
    folder = path.resolve().parent
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{path}, tensor {tensor.name!r}"
        file = folder / location
        if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder):
            raise ModelError(
                f"the file wants to read its weights from {location!r}, outside of its own folder; this was refused",
                where=where,
                remedy="put the data file beside the .onnx file and refer to it by its bare name (onnx.save_model writes that)",
            )
        if not file.is_file():
            raise ModelError(
                f"the weights are stored in {location!r}, which is missing",
                where=where,
                remedy=f"copy {location!r} into {folder}",
            )
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except ValueError:
            raise _damaged(str(path)) from None
        size = file.stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise ModelError(
                f"{location!r} is too short: {offset + length} bytes are needed, it has {size}",
                where=where,
                remedy="copy the data file again",
            )
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:
            raise ModelError(
                f"the weights in {location!r} cannot be read ({error})", where=where, remedy="export the network again"
            ) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, in branches and loop bodies as well."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for branch in attribute.graphs:
                yield from _nodes(branch)


def _check_operators(proto: onnx.ModelProto) -> None:
    """Name every operator that nobody knows, all places at once; the checker stops at the first.

    Raises:
        UnsupportedOpError: ONNX itself does not define some of them at the file's operator set, or they are of another domain
            and the op table has no row for them.
    """
    from zsq_deploy.model.ops.support import UnsupportedUse, lookup, raise_unsupported

    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("", 1) > onnx.defs.onnx_opset_version():
        return  # an operator set from the future: the checker says so
    local = {(function.domain, function.name) for function in proto.functions}
    found: dict[tuple[str, str], list[str]] = {}
    for node in _nodes(proto.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in local:
            continue
        if domain == "":
            opset = opsets.get("", 1)
            if onnx.defs.has(node.op_type, opset, ""):
                continue  # older forms are upgraded; what is then missing is said by the op table, again all at once
            reason = f"ONNX has no such operator in operator set {opset}"
        elif lookup(domain, node.op_type) is not None:
            continue
        else:
            reason = "not in the op table"
        title = f"{domain}::{node.op_type}" if domain else node.op_type
        found.setdefault((title, reason), []).append(node.name or f"(the node that makes {node.output[0]!r})")
    raise_unsupported(tuple(UnsupportedUse(op, reason, tuple(names)) for (op, reason), names in found.items()))


def _check(proto: onnx.ModelProto, where: str) -> None:
    """Let the ONNX project's own checker look at the file."""
    if proto.ByteSize() > _TWO_GIB:
        return  # the checker takes no model of this size from memory; reading its tensors will tell what is wrong
    # The checker wants a shape on every output; runtimes do not, and exporters leave it out.
    bare = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for tensor_type in bare:
        tensor_type.shape.SetInParent()
    try:
        _check_operators(proto)
        onnx.checker.check_model(proto)
    except UnsupportedOpError as error:
        raise UnsupportedOpError(error.what, where=f"{where}\n         {error.where}", remedy=error.remedy) from None
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"the file breaks the ONNX rules: {lines[0] if lines else type(error).__name__}",
            where=where,
            remedy="export the network again, with a current exporter",
        ) from error
    finally:
        for tensor_type in bare:
            tensor_type.ClearField("shape")
