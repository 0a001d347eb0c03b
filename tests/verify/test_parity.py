"""Parity against closed forms, an independent numpy formulation, and its own streaming property."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.errors import DataError, EngineError, UsageError
from zsq_deploy.verify.parity import SQNR_LIMIT_DB, ParityAccumulator, compare


def one(engine, reference, step=1.0):
    return compare({"y": np.asarray(engine)}, {"y": np.asarray(reference)}, {"y": step})


def test_closed_form_on_a_hand_made_output():
    reference = np.array([[0.0, 10.0, -4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    engine = reference + 0.5 * np.array([[0, 1, -2, 5], [0, 0, 0.5, -40]])
    found = one(engine, reference, 0.5)
    assert found.samples == 2
    assert found.elements == 8
    assert found.equal_share == 3 / 8
    assert found.within_half_lsb == 4 / 8
    assert found.within_1_lsb == 5 / 8
    assert found.within_2_lsb == 6 / 8
    assert found.max_lsb == 40
    assert found.mean_lsb == (1 + 2 + 5 + 0.5 + 40) / 8
    noise = 0.25 * (1 + 4 + 25 + 0.25 + 1600)
    signal = 100 + 16 + 4 + 1 + 4 + 9 + 16
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-12)
    cosine = (engine * reference).sum() / math.sqrt((engine**2).sum() * (reference**2).sum())
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    counted = dict(zip(found.histogram.lsb, found.histogram.counts, strict=True))
    assert {lsb: n for lsb, n in counted.items() if n} == {-2: 1, 0: 4, 1: 1, 5: 1}
    assert (found.histogram.below, found.histogram.above) == (1, 0)


def test_identical_outputs_reach_the_limit():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    found = one(x, x.copy(), 0.1)
    assert found.identical
    assert (found.max_lsb, found.mean_lsb, found.sqnr_db, found.top1_agreement) == (0, 0, SQNR_LIMIT_DB, 1.0)
    assert found.cosine == pytest.approx(1, abs=1e-15)


def test_one_bit_off_is_not_equal_but_within():
    x = np.ones((1, 1000), np.float32)
    found = one(np.nextafter(x, np.float32(2)), x, 0.01)
    assert found.equal_share == 0
    assert found.within_half_lsb == 1


def test_dequantized_codes_one_apart_are_within_one_lsb():
    """float32 products of code and scale are off by rounding; a difference of one code stays a difference of one LSB."""
    scale = np.float32(0.0123)
    codes = np.arange(1, 65535).reshape(1, -1)
    found = one((codes + 1).astype(np.float32) * scale, codes.astype(np.float32) * scale, float(scale))
    assert found.within_1_lsb == 1.0
    assert found.within_half_lsb == 0.0


def test_ties_are_told_apart_from_disagreements():
    reference = np.array([[5.0, 4.5, 0.0], [5.0, 1.0, 0.0], [5.0, 5.0, 0.0], [9.0, 0.0, 1.0]])
    engine = np.array([[4.5, 5.0, 0.0], [1.0, 5.0, 0.0], [4.0, 5.0, 0.0], [9.0, 0.0, 1.0]])
    found = one(engine, reference, 1.0)
    assert found.top1_agreement == 1 / 4
    assert found.tie_disagreements == 2  # samples 0 and 2: the other class is within 1 LSB in the reference
    assert found.disagreements == 1  # sample 1: it is 4 LSB behind
    assert found.near_ties == 2
    assert found.top1_agreement_but_ties == 3 / 4


def test_a_near_tie_does_not_excuse_a_third_class():
    reference = np.array([[5.0, 4.9, 0.0]])
    engine = np.array([[0.0, 0.0, 5.0]])
    found = one(engine, reference, 1.0)
    assert (found.near_ties, found.tie_disagreements, found.disagreements) == (1, 0, 1)


@pytest.mark.parametrize(
    ("shape", "classes"), [((4, 3), True), ((4, 3, 1, 1), True), ((4, 3, 2), False), ((4, 1), False)]
)
def test_only_class_scores_have_a_top_1(shape, classes):
    x = np.random.default_rng(1).normal(size=shape)
    assert (one(x, x).top1_agreement is not None) == classes


def test_not_a_number_on_one_side_is_never_within():
    reference = np.array([[1.0, np.nan, np.inf, 2.0]])
    engine = np.array([[np.nan, np.nan, np.inf, 2.0]])
    found = one(engine, reference)
    assert found.non_finite == 1
    assert found.equal_share == 3 / 4
    assert found.within_2_lsb == 3 / 4
    assert found.histogram.below == 1
    assert math.isfinite(found.max_lsb)
    assert found.sqnr_db == -SQNR_LIMIT_DB


def test_several_outputs_are_pooled_and_the_worst_is_named():
    good = np.array([[1.0, 2.0]])
    result = compare({"a": good, "b": good + np.array([[0, 3]])}, {"a": good, "b": good}, {"a": 1.0, "b": 1.0})
    assert result.equal_share == 3 / 4
    assert result.max_lsb == 3
    assert result.sqnr_db == result.outputs["b"].sqnr_db
    assert result.outputs["a"].identical
    assert result.to_json()["step"] is None


def test_whole_number_outputs_and_scalars_work():
    assert compare({"n": np.array(3)}, {"n": np.array(4)}, {"n": 1.0}).max_lsb == 1
    assert one(np.array([[True, False]]), np.array([[True, True]])).max_lsb == 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 23), max_size=6),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_result_does_not_depend_on_the_cut_into_batches(seed, cuts, columns, dtype):
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(23, columns)) * 10.0 ** rng.integers(-6, 6, size=(23, 1))).astype(dtype)
    engine = (reference + rng.choice([0, 0.01, -0.01, 1e-9], size=reference.shape)).astype(dtype)
    whole = one(engine, reference, 0.01)
    accumulator = ParityAccumulator({"y": 0.01})
    edges = [0, *sorted(cuts), 23]
    for low, high in itertools.pairwise(edges):
        accumulator.update({"y": engine[low:high]}, {"y": reference[low:high]})
    assert accumulator.result() == whole  # exactly: every field, every bit


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), step=st.floats(1e-3, 10))
def test_against_a_plain_numpy_formulation(seed, step):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(7, 11))
    codes = rng.integers(-30, 31, size=reference.shape)
    found = one(reference + codes * step, reference, step)
    size = np.abs(codes)
    assert found.within_half_lsb == np.mean(size == 0)
    assert found.within_1_lsb == np.mean(size <= 1)
    assert found.within_2_lsb == np.mean(size <= 2)
    assert found.max_lsb == pytest.approx(size.max(), rel=1e-9)
    assert found.mean_lsb == pytest.approx(size.mean(), rel=1e-9)
    assert sum(found.histogram.counts) + found.histogram.below + found.histogram.above == size.size
    assert found.histogram.below == np.sum(codes < -16)
    assert found.histogram.above == np.sum(codes > 16)
    wanted = [np.sum(codes == k) for k in found.histogram.lsb]
    assert list(found.histogram.counts) == wanted


def test_wrong_use_is_named():
    x = np.zeros((1, 2))
    with pytest.raises(UsageError, match="step of output 'y' is 0"):
        one(x, x, 0)
    with pytest.raises(UsageError, match="no output"):
        ParityAccumulator({})
    with pytest.raises(EngineError, match="engine has no output 'y'"):
        compare({"z": x}, {"y": x}, {"y": 1})
    with pytest.raises(EngineError, match="shape"):
        one(x, np.zeros((1, 3)))
    with pytest.raises(DataError, match="nothing was compared"):
        ParityAccumulator({"y": 1.0}).result()
    with pytest.raises(DataError, match="nothing was compared"):
        one(np.zeros((0, 2)), np.zeros((0, 2)))
