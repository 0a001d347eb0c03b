"""Weight files for torch modules: tensors only, and every key accounted for."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model.onnx_file import signature

__all__ = ["load_weights", "read_weights"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_SHOWN = 5


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, on the CPU.

    Pickled files are read with ``weights_only=True``, which refuses everything but tensors and plain containers.

    Raises:
        ModelError: The file is missing, damaged, or holds more than tensors.
        UsageError: The suffix is none of these.
    """
    where = str(path)
    if not path.is_file():
        raise ModelError("the weight file does not exist", where=where, remedy="check the path given with --weights")
    kind = signature(path)
    if kind == "empty":
        raise ModelError("the weight file is empty", where=where, remedy="copy or save it again")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path, kind)
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _read_pickled(path)
    raise UsageError(
        f"weights cannot be read from a {suffix or 'file without suffix'!r} file",
        where=where,
        remedy="give a .safetensors, .pt or .pth file that holds a state_dict",
    )


def _read_safetensors(path: Path, kind: str) -> dict[str, torch.Tensor]:
    if kind in ("pickle", "zip"):
        raise ModelError(
            "the file is called .safetensors but is a pickle in disguise, which can run code when it is read; it was not opened",
            where=str(path),
            remedy="get the file from a source that you trust, or save it again with safetensors.torch.save_file",
        )
    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the weight file is damaged or is not in safetensors format ({error})",
            where=str(path),
            remedy="copy or save it again",
        ) from error


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    where = str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which is no news for the user
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "the weight file holds Python objects besides tensors, which can run code when they are read; it was not opened",
            where=where,
            remedy="save the weights alone: torch.save(model.state_dict(), 'weights.pt'), or use safetensors",
        ) from error
    except Exception as error:  # torch raises many types for damaged archives
        raise ModelError(
            f"the weight file is damaged or is no PyTorch file ({type(error).__name__})",
            where=where,
            remedy="copy or save it again",
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ModelError(
            "the weight file holds no named tensors",
            where=where,
            remedy="save a state_dict: torch.save(model.state_dict(), ...)",
        )
    return tensors


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Put the tensors of a weight file into a module.

    A common prefix ``module.`` (left by parallel training) is removed. Every key has to fit; only the counters
    ``num_batches_tracked`` may be missing.

    Raises:
        ModelError: Keys are missing, unexpected, or of another shape; the first few of each are named.
    """
    tensors = read_weights(path)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    own = module.state_dict()
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in own]
    shapes = [
        f"{key} (file {tuple(value.shape)}, network {tuple(own[key].shape)})"
        for key, value in tensors.items()
        if key in own and value.shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {kind}: {_list(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise ModelError(
            "the weights do not belong to this network; " + "; ".join(parts),
            where=str(path),
            remedy="check that --weights and the network are of the same architecture and version",
        )
    module.load_state_dict(tensors, strict=False)
