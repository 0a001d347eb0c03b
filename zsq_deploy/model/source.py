"""Where networks come from: ``module:callable``, ``timm:NAME``, ``.onnx``, ``.pt2``, or a torch module at hand.

Every reader ends in the same form, an ONNX model with batch normalization kept, and says what is wrong in one error.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch

from zsq_deploy.errors import ModelError, UsageError, ZsqError
from zsq_deploy.model.export import export_module, export_program, quiet
from zsq_deploy.model.onnx_file import read_onnx, signature
from zsq_deploy.model.weights import load_weights

__all__ = ["Loaded", "Shapes", "read_source"]

Shapes = Sequence[int] | Mapping[str, Sequence[int]]

_FORMS = "a network is named as module:callable, timm:NAME, FILE.onnx or FILE.pt2"


@dataclass(frozen=True)
class Loaded:
    """A network as it was read.

    Attributes:
        proto: As ONNX.
        name: Short name.
        source: As the user said it.
        notes: What the user should know.
        module: The torch module behind it, where there is one, to compare with.
        normalization: Mean and standard deviation that the source itself names (timm does).
    """

    proto: onnx.ModelProto
    name: str
    source: str
    notes: tuple[str, ...] = ()
    module: torch.nn.Module | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def read_source(
    source: str | Path | torch.nn.Module,
    *,
    path: str | Path | None = None,
    weights: str | Path | None = None,
    input_shape: Shapes | None = None,
) -> Loaded:
    """Read a network from wherever it is.

    Args:
        source: See the module's docstring.
        path: Folder that ``module:callable`` is imported from.
        weights: Weight file for ``module:callable``, ``timm:NAME`` and modules.
        input_shape: Shape of the input with the batch in front; torch modules need it.

    Raises:
        UsageError: The source or an option does not make sense.
        ModelError: The network cannot be read, built or exported.
    """
    if isinstance(source, torch.nn.Module):
        return _from_module(source, type(source).__name__, type(source).__name__, weights, input_shape)
    text = str(source)
    if isinstance(source, str) and text.startswith("timm:"):
        return _from_timm(text, weights, input_shape)
    suffix = Path(text).suffix.lower()
    if suffix in (".onnx", ".pt2"):
        for option, value in (("--weights", weights), ("--path", path)):
            if value is not None:
                raise UsageError(
                    f"{option} does not go with a {suffix} file, which holds everything itself",
                    where=text,
                    remedy=f"leave {option} out",
                )
        if suffix == ".onnx":
            return Loaded(read_onnx(Path(text)), Path(text).stem, text)
        return _from_exported_program(Path(text))
    if suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors") and Path(text).exists():
        raise UsageError(
            "this file holds weights, not a network",
            where=text,
            remedy=f"name the code that builds the network and give this file with it: module:callable --weights {text}",
        )
    if isinstance(source, str) and ":" in text:
        module = _build(text, path)
        return _from_module(module, text.rsplit(":", 1)[1].rsplit(".", 1)[-1], text, weights, input_shape)
    exists = Path(text).exists()
    raise UsageError(
        f"this file type is not known ({suffix or 'no suffix'})" if exists else "this does not name a network",
        where=text,
        remedy=_FORMS,
    )


# -- torch modules --------------------------------------------------------------------------------------------------------


def _from_module(
    module: torch.nn.Module,
    name: str,
    source: str,
    weights: str | Path | None,
    input_shape: Shapes | None,
) -> Loaded:
    if input_shape is None:
        raise UsageError(
            "a torch network does not say how large its input is",
            where=source,
            remedy="say it with --input-shape, for example --input-shape 1x3x224x224",
        )
    sizes = list(input_shape.values()) if isinstance(input_shape, Mapping) else [input_shape]
    if any(len(shape) < 2 or any(int(size) <= 0 for size in shape) for shape in sizes):
        raise UsageError(
            "an input shape has a batch and at least one more size, all positive",
            where="--input-shape",
            remedy="for example --input-shape 1x3x224x224",
        )
    try:
        own = copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"the module cannot be copied ({type(error).__name__}: {error})",
            where=source,
            remedy="give a freshly built module, or export it to ONNX and give the file",
        ) from error
    own = own.cpu().float().eval().requires_grad_(requires_grad=False)
    if weights is not None:
        load_weights(own, Path(weights))
    bad = [key for key, value in own.state_dict().items() if value.is_floating_point() and bool(value.isnan().any())]
    if bad:
        raise ModelError(
            f"the network has weights that are no numbers (NaN): {', '.join(bad[:5])}"
            + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""),
            where=str(weights or source),
            remedy="use an earlier checkpoint: training has diverged, or the file was damaged",
        )
    return Loaded(export_module(own, input_shape, where=source), name, source, module=own)


def _build(text: str, path: str | Path | None) -> torch.nn.Module:
    """Import ``module:callable`` and call it."""
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{text!r} is not module:callable", where=text, remedy=_FORMS)
    if path is not None and not Path(path).is_dir():
        raise UsageError("--path is not a folder", where=str(path), remedy="give the folder that holds the module")
    with _search_path(path, module_name):
        module = _import(module_name, text, path)
        found: Any = module
        for part in attribute.split("."):
            if not hasattr(found, part):
                names = [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]
                raise UsageError(
                    f"module {module_name!r} has no {attribute!r}",
                    where=text,
                    remedy=f"it has: {', '.join(names[:12])}" if names else "check the name",
                )
            found = getattr(found, part)
        if isinstance(found, torch.nn.Module):
            return found
        if not callable(found):
            raise UsageError(
                f"{attribute!r} is a {type(found).__name__}, not something that builds a network",
                where=text,
                remedy="name a function or class that returns a torch.nn.Module",
            )
        try:
            built = found()
        except ZsqError:
            raise
        except Exception as error:
            raise ModelError(
                f"{attribute}() failed: {type(error).__name__}: {error}",
                where=text,
                remedy="it is called without arguments; write a small function that builds the network as it should be",
            ) from error
    if not isinstance(built, torch.nn.Module):
        raise ModelError(
            f"{attribute}() returned a {type(built).__name__}, not a torch.nn.Module",
            where=text,
            remedy="name a function or class that returns the network itself",
        )
    return built


@contextlib.contextmanager
def _search_path(path: str | Path | None, module_name: str) -> Iterator[None]:
    """Import from `path` first, for a while; a module of the same name from elsewhere is put aside meanwhile."""
    before = list(sys.path)
    top = module_name.partition(".")[0]
    aside: dict[str, ModuleType] = {}
    if path is not None:
        folder = str(Path(path).resolve())
        sys.path.insert(0, folder)
        known = sys.modules.get(top)
        origin = getattr(known, "__file__", None)
        own = (Path(folder) / f"{top}.py").exists() or (Path(folder) / top).is_dir()
        if known is not None and own and not (origin and Path(origin).resolve().is_relative_to(folder)):
            aside = {name: item for name, item in sys.modules.items() if name == top or name.startswith(top + ".")}
            for name in aside:
                del sys.modules[name]
    else:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        sys.modules.update(aside)


def _import(module_name: str, text: str, path: str | Path | None) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(
                f"there is no module {module_name!r}",
                where=text,
                remedy=f"it was looked for in {path}"
                if path is not None
                else "say where it is with --path DIR, or check the name",
            ) from error
        raise ModelError(
            f"module {module_name!r} needs {error.name!r}, which is not installed",
            where=text,
            remedy=f"pip install {str(error.name).partition('.')[0]}, or say where it is with --path",
        ) from error
    except Exception as error:
        raise ModelError(
            f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}",
            where=text,
            remedy="make sure that python can import it",
        ) from error


# -- timm -----------------------------------------------------------------------------------------------------------------


def _import_timm() -> Any:
    """Timm, also beside a torchvision whose compiled part does not fit this torch.

    Such a torchvision fails at its first import, because it describes two operators that its compiled part would have
    brought. Networks of timm do not use them; declaring their signatures is enough.
    """
    remedy = "install it: pip install 'zsq-deploy[timm]'"
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise ModelError("timm is not installed", where="timm", remedy=remedy) from error
        raise ModelError(f"timm needs {error.name!r}, which is not installed", where="timm", remedy=remedy) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise ModelError(f"timm cannot be imported: {error}", where="timm", remedy=remedy) from error
    except Exception as error:
        raise ModelError(f"timm cannot be imported: {error}", where="timm", remedy=remedy) from error
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(  # type: ignore[no-untyped-call]
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    _TORCHVISION.append(library)  # its operators live as long as it does
    try:
        return importlib.import_module("timm")
    except Exception as error:
        raise ModelError(
            f"timm cannot be imported, because torchvision does not fit this torch: {error}",
            where="timm",
            remedy="install a torchvision that was built for this version of torch",
        ) from error


_TORCHVISION: list[torch.library.Library] = []


def _from_timm(text: str, weights: str | Path | None, input_shape: Shapes | None) -> Loaded:
    name = text.partition(":")[2]
    timm = _import_timm()
    bare = name.partition(".")[0]
    if not name or not timm.is_model(bare):
        close = difflib.get_close_matches(bare, timm.list_models(), n=5)
        raise UsageError(
            f"timm has no network called {name!r}",
            where=text,
            remedy=f"close names: {', '.join(close)}" if close else "timm.list_models() lists the names",
        )
    try:
        with quiet():
            module = timm.create_model(name, pretrained=weights is None)
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where=text,
            remedy="without --weights timm downloads them, which needs a network connection; give a file with --weights",
        ) from error
    config = dict(getattr(module, "pretrained_cfg", None) or {})
    shape = input_shape or (1, *config.get("input_size", (3, 224, 224)))
    loaded = _from_module(module, bare, text, weights, shape)
    if config.get("mean") and config.get("std"):
        normalization = (tuple(map(float, config["mean"])), tuple(map(float, config["std"])))
        loaded = replace(loaded, normalization=normalization)
    return loaded


# -- exported programs ----------------------------------------------------------------------------------------------------


def _from_exported_program(path: Path) -> Loaded:
    where = str(path)
    if not path.is_file():
        raise ModelError("the file does not exist", where=where, remedy="check the path")
    kind = signature(path)
    if kind == "pickle":
        raise ModelError(
            "the file is called .pt2 but is a Python pickle, which can run code when it is read; it was not opened",
            where=where,
            remedy="save the network with torch.export.save(torch.export.export(module.eval(), ...), 'model.pt2')",
        )
    if kind != "zip":
        raise ModelError(
            "the file is empty" if kind == "empty" else "the file is damaged or is not an exported program",
            where=where,
            remedy="copy it again, or save it again with torch.export.save",
        )
    _refuse_objects(path)
    try:
        with _tensors_only(), quiet():
            program = torch.export.load(path)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ModelError(
            f"the exported program cannot be read: {text[0][:300] if text else type(error).__name__}",
            where=where,
            remedy="save it again with torch.export.save and this version of torch; it must hold tensors only",
        ) from error
    notes: tuple[str, ...] = ()
    return Loaded(export_program(program, where=where), path.stem, where, notes)


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch.load refuse everything but tensors, whatever its caller asks for."""
    name, other = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.pop(key, None) for key in (name, other)}
    os.environ[name] = "1"
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _refuse_objects(path: Path) -> None:
    """Refuse archives that store Python or script objects as constants: reading those runs code."""
    prefixes = ("custom_obj_", "opaque_obj_")
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for item in archive.namelist():
                found = Path(item).name.startswith(prefixes)
                if item.endswith("constants_config.json"):
                    entries = json.loads(archive.read(item)).get("config", {}).values()
                    found = found or any(str(entry.get("path_name", "")).startswith(prefixes) for entry in entries)
                if found:
                    raise ModelError(
                        "the exported program holds objects besides tensors, which can run code when they are read; "
                        "it was not opened",
                        where=f"{where}, {item}",
                        remedy="export the network without custom classes, or export it to ONNX",
                    )
    except (zipfile.BadZipFile, json.JSONDecodeError, AttributeError, OSError) as error:
        raise ModelError(
            f"the file is damaged ({error})",
            where=where,
            remedy="copy it again, or save it again with torch.export.save",
        ) from error
