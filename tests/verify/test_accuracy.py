"""Accuracy, paired differences and agreement on decisions that are known in advance."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from zsq_deploy.errors import DataError, EngineError, UsageError
from zsq_deploy.verify.accuracy import evaluate, image_feeds, mcnemar


def scores(decisions, classes=4):
    return np.eye(classes)[np.asarray(decisions)] * 10


LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3])
FLOAT = np.array([0, 1, 2, 3, 0, 1, 0, 0])  # 6 of 8
ENGINE = np.array([0, 1, 2, 0, 0, 2, 2, 0])  # 5 of 8: loses two, gains one
TWIN = np.array([0, 1, 2, 3, 0, 1, 2, 0])  # 7 of 8


def table(decisions):
    """A 'network' that looks its answer up by the number in its input."""
    return lambda feeds: {"logits": scores(decisions)[feeds["x"][:, 0].astype(int)]}


def batches(labels, size=3):
    x = np.arange(8.0).reshape(8, 1)
    for start in range(0, 8, size):
        stop = start + size
        yield {"x": x[start:stop]}, None if labels is None else labels[start:stop]


MODELS = {"float": table(FLOAT), "reference": table(TWIN), "engine": table(ENGINE)}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_labelled_accuracy_is_counted_and_paired(size):
    found = evaluate(batches(LABELS, size), MODELS, steps={"logits": 1.0})
    accuracy = found.accuracy
    assert accuracy.metric == "top1"
    assert accuracy.values == {"float": 6 / 8, "reference": 7 / 8, "engine": 5 / 8}
    assert accuracy.images == 8
    assert not accuracy.estimate
    assert accuracy.standard_error == pytest.approx(np.sqrt(0.75 * 0.25 / 8))
    assert accuracy.agreement == {"reference": 7 / 8, "engine": 5 / 8}
    paired = accuracy.paired["engine"]
    assert (paired.lost, paired.gained) == (2, 1)
    assert paired.difference == -1 / 8
    each = (ENGINE == LABELS).astype(float) - (FLOAT == LABELS)
    assert paired.standard_error == pytest.approx(each.std(ddof=1) / np.sqrt(8))
    assert paired.p_value == pytest.approx(scipy.stats.binomtest(1, 3).pvalue)
    assert found.parity["reference"].top1_agreement == np.mean(ENGINE == TWIN)
    assert found.parity["float"].top1_agreement == np.mean(ENGINE == FLOAT)
    assert set(found.parity) == {"float", "reference"}


def test_without_labels_it_is_an_estimate():
    accuracy = evaluate(batches(None), MODELS, steps={"logits": 1.0}).accuracy
    assert accuracy.estimate
    assert accuracy.metric == "agreement_with_float"
    assert accuracy.values == {"float": 1.0, "reference": 7 / 8, "engine": 5 / 8}
    assert accuracy.paired == {}
    assert accuracy.to_json()["estimate"] is True


def test_a_slow_reference_sees_the_first_samples_only():
    seen = []

    def integer(feeds):
        seen.extend(feeds["x"][:, 0])
        return MODELS["engine"](feeds)

    found = evaluate(batches(LABELS), {**MODELS, "integer": integer}, steps={"logits": 1.0}, limits={"integer": 4})
    assert seen == [0, 1, 2, 3]
    assert found.parity["integer"].samples == 4
    assert found.parity["integer"].identical
    assert "integer" not in found.accuracy.values
    assert found.parity["reference"].samples == 8


def test_regression_without_targets_is_sqnr_against_float():
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8))
    models = {"float": lambda f: {"y": f["x"]}, "engine": lambda f: {"y": f["x"] + 0.01}}
    accuracy = evaluate([({"x": x}, None)], models, steps={"y": 0.1}).accuracy
    assert accuracy.metric == "sqnr_db"
    assert accuracy.values["engine"] == pytest.approx(10 * np.log10((x**2).sum() / (1e-4 * x.size)), abs=1e-6)
    assert accuracy.agreement == {}


def test_regression_with_targets_is_the_mean_psnr():
    clean = np.zeros((2, 1, 4, 4))
    models = {"float": lambda f: {"y": f["x"]}, "engine": lambda f: {"y": f["x"] * 2}}
    noisy = np.stack([np.full((1, 4, 4), 1.0), np.full((1, 4, 4), 10.0)])
    accuracy = evaluate([({"x": noisy}, clean)], models, steps={"y": 1.0}, peak=255).accuracy
    assert accuracy.metric == "psnr_db"
    psnr = [20 * np.log10(255 / 1), 20 * np.log10(255 / 10)]
    assert accuracy.values["float"] == pytest.approx(np.mean(psnr))
    assert accuracy.values["engine"] == pytest.approx(np.mean(psnr) - 20 * np.log10(2))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (12, 3), (400, 350), (3000, 2800)])
def test_mcnemar_against_scipy(lost, gained):
    wanted = scipy.stats.binomtest(min(lost, gained), lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(wanted, rel=1e-6)


def test_image_feeds_apply_the_preprocessing():
    class Data:
        def batches(self, batch_size):
            yield np.full((batch_size, 2, 2, 3), 255, np.uint8), np.zeros(batch_size, int)

    class Half:
        def apply(self, images):
            return images.transpose(0, 3, 1, 2).astype(np.float32) / 510

    ((feeds, labels),) = image_feeds(Data(), Half(), "image", 5)
    assert feeds["image"].shape == (5, 3, 2, 2)
    assert np.all(feeds["image"] == 0.5)
    assert len(labels) == 5


def test_bad_data_are_named():
    step = {"logits": 1.0}
    with pytest.raises(DataError, match="empty"):
        evaluate([], MODELS, steps=step)
    with pytest.raises(DataError, match="0 to 7, but output 'logits' has 4 classes"):
        evaluate(batches(np.arange(8), 8), MODELS, steps=step)
    with pytest.raises(DataError, match="class number"):
        evaluate(batches(LABELS * 0.5), MODELS, steps=step)
    with pytest.raises(DataError, match="3 samples come with 2 labels"):
        evaluate([({"x": np.zeros((3, 1))}, LABELS[:2])], MODELS, steps=step)
    with pytest.raises(DataError, match="targets have shape"):
        evaluate([({"x": np.zeros((3, 1))}, np.zeros((3, 5, 5)))], MODELS, steps=step)
    with pytest.raises(DataError, match="some batches have labels"):
        evaluate([*batches(None, 8), *batches(LABELS, 8)], MODELS, steps=step)
    with pytest.raises(UsageError, match="'float'"):
        evaluate(batches(LABELS), {"engine": table(ENGINE)}, steps=step)
    with pytest.raises(UsageError, match="every sample"):
        evaluate(batches(LABELS), MODELS, steps=step, limits={"engine": 2})
    with pytest.raises(EngineError, match="has no output 'other'"):
        evaluate(batches(LABELS), MODELS, steps={"other": 1.0})
