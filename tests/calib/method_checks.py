"""What every synthesis method has to keep, for the tests of single methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, InterruptedRunError
from zsq_deploy.model import Model

Made = Callable[..., Any]


def made(model: Model, method: str, images: int = 6, *, batch_size: int | None = 3, **more: Any) -> Any:
    return synthesize(model, method=method, images=images, batch_size=batch_size, device="cpu", **more)


def pixels(model: Model, method: str, parameters: Mapping[str, Any], **more: Any) -> np.ndarray:
    return made(model, method, parameters=parameters, **more).arrays()["image"]


def check_same_seed_same_bits(model: Model, method: str, parameters: Mapping[str, Any]) -> None:
    first, again, other = (pixels(model, method, parameters, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:3], first[3:])


def check_resumes_exactly(
    model: Model, method: str, parameters: Mapping[str, Any], recorder: Made, folder: Path, at: int
) -> None:
    """Interrupted at step `at` and resumed, a run gives the same bits and computes nothing twice."""
    counting = recorder()
    whole = made(model, method, parameters=parameters, progress=counting)
    total = len(counting.values)
    at = 1 + at % total
    with pytest.raises(InterruptedRunError):
        made(model, method, parameters=parameters, workdir=folder, progress=recorder(at))
    again = recorder()
    resumed = made(model, method, parameters=parameters, workdir=folder, resume=True, progress=again)
    assert resumed.digest == whole.digest
    assert resumed.manifest.parameters == whole.manifest.parameters
    assert len(again.values) == total - at


def check_any_picture(classifier: Made, method: str, parameters: Mapping[str, Any]) -> None:
    """Gray and colour, raw pixels, sizes that are no square and no multiple of anything: valid pixels come out."""
    from zsq_deploy.model import Preprocess

    for preprocess, channels in ((Preprocess(raw_pixels=True), 3), (Preprocess(mean=(0.5,), std=(0.5,)), 1)):
        model = classifier(preprocess, channels, (11, 18))
        images = pixels(model, method, parameters, images=5, batch_size=None)
        assert images.shape == (5, channels, 11, 18)
        assert np.isfinite(images).all()
        low, high = (np.asarray(side).reshape(1, -1, 1, 1) for side in preprocess.bounds(channels))
        assert (images >= low).all()
        assert (images <= high).all()
        assert images.std() > 0.05 * float((high - low).max())


def check_needs_classes(not_a_classifier: Model, method: str) -> None:
    with pytest.raises(CalibrationError, match="class"):
        made(not_a_classifier, method)


def losses(model: Model, method: str, parameters: Mapping[str, Any], stage: int = -1) -> tuple[dict, dict]:
    """First and last losses of a stage, mean over its batches."""
    said = made(model, method, parameters=parameters).manifest.parameters
    outcome = [*said.get("earlier_stages", []), said][stage]["outcome"]
    return tuple(
        {name: float(np.mean([values[name] for values in outcome[when]])) for name in outcome[when][0]}
        for when in ("first", "last")
    )


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_classes(model: Model) -> Model:
    """The same network ending in front of its pooling: a picture comes out."""
    import onnx

    from zsq_deploy.model import Graph

    proto = onnx.ModelProto.FromString(model.graph.proto.SerializeToString())
    last = next(node for node in reversed(proto.graph.node) if node.op_type == "Relu")
    keep = list(proto.graph.node)[: list(proto.graph.node).index(last) + 1]
    del proto.graph.node[:], proto.graph.output[:]
    proto.graph.node.extend(keep)
    shape = model.graph.shape(last.output[0])
    assert shape is not None
    dims = ["N" if size is None else size for size in shape]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, dims))
    return Model(Graph(proto), model.preprocess, "picture", "picture.onnx", model.dynamic_batch)
