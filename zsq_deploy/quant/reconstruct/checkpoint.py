"""What was learned, block by block on disk, so that an interrupted reconstruction goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.artifact import atomic_writer, digest_json, read_json, write_json
from zsq_deploy.errors import OutputExistsError, StaleArtifactError
from zsq_deploy.quant.reconstruct.state import Activation, State, Weight
from zsq_deploy.quant.scheme import Scheme

__all__ = ["Checkpoints"]

_SCHEMA = 1
_MANIFEST = "reconstruction.json"


class Checkpoints:
    """A folder with one file a block.

    Args:
        folder: Made if it is not there.
        content: What the reconstruction is: digests of network and images, bits, protocol, preset, seed. Another one is refused.
        resume: Go on with what is there; without it a folder in use is refused.

    Raises:
        OutputExistsError: There is a reconstruction in the folder already, and it is not to be resumed.
        StaleArtifactError: It is another one.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = Path(folder)
        manifest = self.folder / _MANIFEST
        digest = digest_json({"schema_version": _SCHEMA, **content})
        if manifest.exists():
            if not resume:
                raise OutputExistsError(
                    "there is a reconstruction in this folder already",
                    where=str(self.folder),
                    remedy="resume it, or choose another folder",
                )
            found = read_json(manifest)
            if not isinstance(found, dict) or found.get("digest") != digest:
                raise StaleArtifactError(
                    "the reconstruction in this folder is of another network, other images or other settings",
                    where=str(self.folder),
                    remedy="choose another folder, or the settings of the interrupted run",
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(manifest, {"schema_version": _SCHEMA, **content, "digest": digest})

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.npz"

    def has(self, number: int) -> bool:
        """Whether that block was finished."""
        return self._path(number).exists()

    def save(self, number: int, state: State, layers: Iterable[str], groups: Iterable[str], loss: float) -> None:
        """Write what a block learned.

        Args:
            number: Of the block.
            state: After it.
            layers: Its layers.
            groups: Its groups of sites.
            loss: Of the last steps.
        """
        arrays: dict[str, Any] = {"loss": np.asarray(loss)}
        for name in layers:
            weight = state.weights[name]
            arrays[f"codes:{name}"] = weight.codes.astype(np.int16)
            arrays[f"scale:{name}"] = weight.scale
            arrays[f"zero:{name}"] = weight.zero_point
            if name in state.biases:
                arrays[f"bias:{name}"] = state.biases[name]
        for name in groups:
            activation = state.activations[name]
            arrays[f"site:{name}"] = np.asarray([activation.scale, activation.zero_point], np.float64)
        # npz keeps names as file names: numbers stand for them, the names are an array of their own
        names = np.asarray(list(arrays), np.str_)
        buffer = io.BytesIO()
        np.savez(buffer, names=names, **{f"a{index}": array for index, array in enumerate(arrays.values())})
        with atomic_writer(self._path(number)) as file:
            file.write(buffer.getbuffer())

    def load(self, number: int, state: State) -> tuple[State, float]:
        """The state with what a block learned, and its loss."""
        with np.load(self._path(number), allow_pickle=False) as data:
            arrays = {str(name): data[f"a{index}"] for index, name in enumerate(data["names"])}
        weights, activations, biases = {}, {}, {}
        for key, array in arrays.items():
            kind, _, name = key.partition(":")
            if kind == "codes":
                old = state.weights[name]
                weights[name] = Weight(
                    array.astype(np.int32), arrays[f"scale:{name}"], arrays[f"zero:{name}"], old.scheme, old.axis
                )
            elif kind == "bias":
                biases[name] = array
            elif kind == "site":
                scheme: Scheme = state.activations[name].scheme
                activations[name] = Activation(float(array[0]), int(array[1]), scheme)
        return state.updated(weights, activations, biases), float(arrays["loss"])
