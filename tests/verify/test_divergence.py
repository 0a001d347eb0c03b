"""The first differing tensor, on a small integer network with one planted rounding flip."""

from __future__ import annotations

import numpy as np
import pytest

from zsq_deploy.errors import DataError, EngineError, UsageError
from zsq_deploy.verify.divergence import TensorWalk, first_divergence, layer_quality, walk_tensors
from zsq_deploy.verify.parity import SQNR_LIMIT_DB

NAMES = ("input", "a", "b", "c")


def execution(x, flip=None):
    """Three layers of whole numbers; `flip` adds one code to one element of `a` in one sample."""
    rng = np.random.default_rng(7)
    mix = rng.integers(-1, 2, size=(6, 6))
    a = x @ mix
    if flip is not None:
        a = a.copy()
        a[flip] += 1
    b = np.maximum(a, 0) @ mix.T
    return {"input": x, "a": a * 0.5, "b": b * 0.25, "c": b.sum(axis=1, keepdims=True) * 0.25}


STEPS = {"a": 0.5, "b": 0.25, "c": 0.25}


def test_the_planted_flip_is_found_and_followed():
    x = np.random.default_rng(0).integers(0, 9, size=(5, 6))
    reference = execution(x)
    positive = int(np.argmax(reference["a"][3]))
    engine = execution(x, flip=(3, positive))
    found = first_divergence(NAMES, engine, reference, STEPS)
    assert found.first == "a"
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["input"].samples_differing == 0
    assert by_name["input"].sqnr_db == SQNR_LIMIT_DB
    assert by_name["a"].differing_share == 1 / 30
    assert by_name["a"].max_lsb == 1
    changed = np.count_nonzero(engine["b"][3] != reference["b"][3])
    assert changed > 0
    assert by_name["b"].differing_share == changed / 30
    assert found.flip.sample == 3
    assert found.flip.start == "a"
    assert found.flip.names == ("a", "b", "c")
    assert found.flip.differing[:2] == (1, changed)
    assert found.flip.elements == (6, 6, 1)
    assert "first differing tensor: a (number 2 of 4)" in str(found)


def test_the_flip_that_starts_smallest_is_followed():
    x = np.random.default_rng(0).integers(1, 9, size=(4, 6))
    reference, engine = execution(x), execution(x)
    engine["b"] = engine["b"].copy()
    engine["b"][0] += 1  # six elements
    engine["b"][2, 1] += 1  # one element
    found = first_divergence(NAMES, engine, reference, STEPS)
    assert (found.flip.sample, found.flip.differing[0]) == (2, 1)


def test_batches_add_up():
    x = np.random.default_rng(3).integers(0, 9, size=(6, 6))
    reference = execution(x)
    engine = execution(x, flip=(4, int(np.argmax(reference["a"][4]))))
    whole = first_divergence(NAMES, engine, reference, STEPS)
    walk = TensorWalk(NAMES, STEPS)
    for cut in (slice(0, 1), slice(1, 4), slice(4, 6)):
        walk.update({n: v[cut] for n, v in engine.items()}, {n: v[cut] for n, v in reference.items()})
    assert walk.result() == whole


def test_two_executions_are_run_and_compared():
    x = np.random.default_rng(3).integers(1, 9, size=(6, 6))

    def run(flip):
        return lambda feeds, names: {name: execution(feeds["input"], flip)[name] for name in names}

    found = walk_tensors([{"input": x[:3]}, {"input": x[3:]}], run((0, 2)), run(None), NAMES[1:], STEPS)
    assert found.samples == 6
    assert found.first == "a"
    assert found.tensors[0].samples_differing == 2  # the first sample of each batch


def test_identical_executions():
    x = np.ones((2, 6))
    found = first_divergence(NAMES, execution(x), execution(x), STEPS)
    assert found.first is None
    assert found.flip is None
    assert "no tensor differs (4 tensors, 2 samples)" in str(found)


def test_below_half_a_step_is_the_same_code():
    x = np.ones((1, 4), np.float32)
    assert first_divergence(["x"], {"x": x + 0.2}, {"x": x}, {"x": 0.5}).first is None
    assert first_divergence(["x"], {"x": x + 0.2}, {"x": x}).first == "x"


def test_layer_quality_is_sqnr_against_float():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1000))
    noise = rng.normal(size=x.shape) * 0.01
    (found,) = layer_quality(["x"], {"x": x + noise}, {"x": x})
    assert found.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / (noise**2).sum()), abs=1e-9)


def test_not_a_number_counts_as_different():
    x = np.ones((1, 3))
    y = x.copy()
    y[0, 1] = np.nan
    found = first_divergence(["x"], {"x": y}, {"x": x})
    assert found.first == "x"
    assert np.isfinite(found.tensors[0].max_abs)


def test_tensors_with_another_first_axis_are_compared_all_the_same():
    engine = {"tokens": np.ones((8, 2)), "y": np.ones((2, 2))}
    reference = {"tokens": np.ones((8, 2)), "y": np.zeros((2, 2))}
    found = first_divergence(["y", "tokens"], engine, reference)
    assert found.first == "y"


def test_wrong_use_is_named():
    x = {"x": np.ones((1, 2))}
    with pytest.raises(UsageError):
        TensorWalk([])
    with pytest.raises(UsageError):
        TensorWalk(["x", "x"])
    with pytest.raises(EngineError, match="gives no tensor 'y'"):
        first_divergence(["y"], x, {"y": x["x"]})
    with pytest.raises(EngineError, match="shape"):
        first_divergence(["x"], x, {"x": np.ones((1, 3))})
    with pytest.raises(DataError):
        TensorWalk(["x"]).result()
