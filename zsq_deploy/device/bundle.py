"""Bundles: one ``.zsq.tar`` with everything that a device needs to prove and measure an engine.

::

    bundle.json            what it is: network, target, runtime, digests of all files, one step of each output, expected parity
    bundle.sha256          digest of bundle.json
    agent.py               the program that runs on the device (see :mod:`zsq_deploy.device.agent`)
    engine/...             the engine
    samples/00000.npz ...  inputs (``input::NAME``) and the outputs of the references (``twin::NAME``, ``integer::NAME``, ``workstation::NAME``)

Every byte of the archive follows from names and contents (no times, no owners), so that the agent can tell a bundle that was changed in any place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import atomic_writer, digest_file
from zsq_deploy.device import agent
from zsq_deploy.errors import OutputExistsError, UsageError, ZsqError

__all__ = ["Contents", "Sample", "open_bundle", "write_bundle"]

Array = npt.NDArray[Any]

SCHEMA = 1


@dataclass(frozen=True)
class Sample:
    """One batch of inputs and what the references make of it.

    Attributes:
        feeds: Inputs by name.
        references: Outputs by name, by the reference's name: ``twin``, ``integer``, ``workstation``.
    """

    feeds: Mapping[str, Array]
    references: Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True)
class Contents:
    """What a bundle is made of.

    Attributes:
        network: Name of the network.
        network_digest: Its digest.
        target: Name of the target.
        runtime: Name of the runtime on the device.
        runtime_version: The version that the engine was built and verified with.
        engine: The file that the runtime loads.
        beside: Files that have to lie beside it (weights).
        session: The runtime's session options.
        steps: One LSB of every output.
        batch: Samples in one timed run.
        limits: Least parity that the agent is to find: reference -> key -> value.
        expected: Parity as it was found on the workstation.
        facts: More for the record (versions, how the samples came about).
    """

    network: str
    network_digest: str
    target: str
    runtime: str
    runtime_version: str
    engine: Path
    steps: Mapping[str, float]
    beside: tuple[Path, ...] = ()
    session: Mapping[str, str] = field(default_factory=dict)
    batch: int = 1
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_bundle(path: Path, contents: Contents, samples: Iterable[Sample], *, force: bool = False) -> Path:
    """Write a bundle.

    Args:
        path: The archive.
        contents: What it is made of.
        samples: Inputs and reference outputs, at least one batch; they are consumed one by one.
        force: Replace an archive that is there.

    Raises:
        OutputExistsError: The archive exists.
        UsageError: The agent cannot run this runtime, or there is no sample.
    """
    if path.exists() and not force:
        raise OutputExistsError(
            "the bundle exists", where=str(path), remedy="choose another name, or replace it with --force"
        )
    if contents.runtime not in agent.RUNTIMES:
        raise UsageError(
            f"the agent cannot run engines of {contents.runtime}",
            where=contents.target,
            remedy=f"it knows {', '.join(agent.RUNTIMES)}; engines of TensorRT have a folder of their own to take to the device",
        )
    with tempfile.TemporaryDirectory(prefix="zsq-bundle-", dir=path.resolve().parent) as temporary:
        folder = Path(temporary)
        (folder / "engine").mkdir()
        (folder / "samples").mkdir()
        shutil.copyfile(agent.__file__, folder / "agent.py")
        for file in (contents.engine, *contents.beside):
            shutil.copyfile(file, folder / "engine" / file.name)
        names = []
        for number, sample in enumerate(samples):
            name = f"samples/{number:05d}.npz"
            _write_sample(folder / name, sample)
            names.append(name)
        if not names:
            raise UsageError("a bundle needs inputs", where=str(path), remedy="ask for one sample or more (--samples)")
        files = sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file())
        manifest = {
            "format": "zsq-bundle",
            "schema_version": SCHEMA,
            "network": contents.network,
            "network_digest": contents.network_digest,
            "target": contents.target,
            "runtime": {"name": contents.runtime, "version": contents.runtime_version},
            "engine": f"engine/{contents.engine.name}",
            "engine_bytes": sum(file.stat().st_size for file in (contents.engine, *contents.beside)),
            "session": dict(contents.session),
            "steps": dict(contents.steps),
            "batch": contents.batch,
            "samples": names,
            "limits": {kind: dict(limits) for kind, limits in contents.limits.items()},
            "expected": dict(contents.expected),
            "facts": dict(contents.facts),
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)} for name in files
            },
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
        (folder / agent.MANIFEST).write_text(text, encoding="utf-8", newline="\n")
        (folder / agent.SEAL).write_text(digest_file(folder / agent.MANIFEST) + "\n", encoding="ascii", newline="\n")
        with atomic_writer(path) as out:
            agent.pack(folder, [agent.MANIFEST, agent.SEAL, *files], out)
    return path


def _write_sample(path: Path, sample: Sample) -> None:
    arrays = {f"input::{name}": np.asarray(value) for name, value in sample.feeds.items()}
    for kind, outputs in sample.references.items():
        arrays.update({f"{kind}::{name}": np.asarray(value) for name, value in outputs.items()})
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def open_bundle(path: Path, folder: Path) -> dict[str, Any]:
    """Unpack a bundle into a folder and check every byte of it.

    Args:
        path: The archive.
        folder: An empty folder.

    Returns:
        The manifest.

    Raises:
        ZsqError: It is no bundle, not a whole one, or was changed.
    """
    try:
        return agent.read_bundle(agent.unpack(path, folder))
    except agent.RefusedError as error:
        raise ZsqError(str(error), where=str(path), remedy="copy it again, or make it again with zsq bundle") from error
