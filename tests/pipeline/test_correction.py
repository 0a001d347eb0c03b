"""Which images correct biases, which decide, and what they are told of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.pipeline import correction
from zsq_deploy.pipeline.correction import Correction, compare_outputs, scrambled, shuffled


def pictures(count, seed=0, size=16):
    """Smooth pictures whose mean is the number of the image."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3, size, size)).cumsum(2).cumsum(3)
    x -= x.mean((2, 3), keepdims=True)
    return (x / x.std() * 0.1 + np.arange(count)[:, None, None, None]).astype(np.float32)


def test_scrambled_pictures_keep_colours_and_spectrum():
    x = pictures(6)
    found = scrambled({"x": x}, 3)["x"]
    assert found.dtype == x.dtype
    # what is clipped at the ends of the range moves the mean a little
    np.testing.assert_allclose(found.mean((2, 3)), x.mean((2, 3)), atol=0.02)
    power = [np.abs(np.fft.rfft2(a - a.mean((2, 3), keepdims=True))) ** 2 for a in (x, found)]
    assert np.corrcoef(power[0].mean((0, 1)).ravel(), power[1].mean((0, 1)).ravel())[0, 1] > 0.98
    assert (found >= x.min((2, 3), keepdims=True)).all()
    assert (found <= x.max((2, 3), keepdims=True)).all()
    centred = [(a - a.mean((2, 3), keepdims=True))[:, 0].reshape(6, -1) for a in (x, found)]
    alike = [abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(*centred, strict=True)]
    assert np.mean(alike) < 0.6
    np.testing.assert_array_equal(scrambled({"x": x}, 3)["x"], found)
    assert (scrambled({"x": x}, 4)["x"] != found).any()


def test_shuffled_pictures_keep_every_pixel():
    x = pictures(4)
    found = shuffled({"x": x}, 3)["x"]
    assert (found != x).any()
    for before, after in zip(x, found, strict=True):  # colours stay together
        assert sorted(map(tuple, before.reshape(3, -1).T)) == sorted(map(tuple, after.reshape(3, -1).T))


@pytest.mark.parametrize("change", [scrambled, shuffled])
def test_what_is_no_picture_stays(change):
    feeds = {"tokens": np.arange(12).reshape(3, 4), "spectra": np.ones((3, 5, 7), np.float32)}
    found = change(feeds, 0)
    for name in feeds:
        np.testing.assert_array_equal(found[name], feeds[name])


class Runtime:
    """Engines are functions of the images, by the name of their file."""

    def __init__(self, functions):
        self.functions = functions

    def runner(self, path, target, *, threads, mode="integer"):
        function = self.functions[Path(path).name]
        return SimpleNamespace(run=lambda feeds: {"y": function(feeds["x"])})


def engine(name, folder=Path("/nowhere")):
    return SimpleNamespace(
        path=folder / name, float_path=folder / "float", target=None, bytes=1, qdq_path=folder / name
    )


def test_scores_that_are_all_too_high_by_the_same_are_no_gain():
    """The second engine is nearer to float by the squared error, and further in what tells classes apart."""
    scores = np.random.default_rng(0).normal(10, 1, (32, 10))
    wrong = np.random.default_rng(1).normal(0, 1, (32, 10))
    runtime = Runtime({
        "float": lambda x: scores,
        "first": lambda x: scores + 3 + 0.2 * wrong,
        "second": lambda x: scores + 0.5 * wrong,
    })  # fmt: skip
    before, after = compare_outputs(runtime, engine("first"), engine("second"), [{"x": np.zeros(1)}], 1)
    spread = [scores - scores.mean(1, keepdims=True), wrong - wrong.mean(1, keepdims=True)]
    ratio = 10 * np.log10(np.square(spread[0]).sum() / np.square(spread[1]).sum())
    assert after == pytest.approx(ratio + 20 * np.log10(1 / 0.5), abs=1e-6)
    assert before == pytest.approx(10 * np.log10(np.square(scores).sum() / np.square(3 + 0.2 * wrong).sum()), abs=1e-6)
    assert before < ratio + 20 * np.log10(1 / 0.2)


def moved(one, folder):
    one.path.parent.rename(folder)
    one.path.parent.mkdir()
    return engine(one.path.name, folder)


def corrected(monkeypatch, tmp_path, count, functions, batch_norms=("one",), tolerance=0.2):
    """A correction of a made-up engine; what it was measured on, and how it ended."""
    measured = []
    seen = {}

    def correct(folded, graph, batches, **_):
        measured.extend(batches)
        return {}

    monkeypatch.setattr(correction, "correct_bias", correct)
    monkeypatch.setattr(correction.Graph, "load", staticmethod(lambda path: None))
    monkeypatch.setattr(correction, "move", moved)
    home = tmp_path / "trial"
    home.mkdir()
    first = engine("first", home)

    def build(folder, options):
        folder.mkdir()
        return engine("second", folder)

    class Watched(Runtime):
        def runner(self, path, target, *, threads, mode="integer"):
            inner = super().runner(path, target, threads=threads)

            def run(feeds):
                seen.setdefault(Path(path).name, []).append(feeds["x"])
                return inner.run(feeds)

            return SimpleNamespace(run=run)

    model = SimpleNamespace(folded=lambda: None, dynamic_batch=True, batch_norms=lambda: list(batch_norms))
    x = pictures(count)
    images = CalibrationSet.from_arrays({"x": x}, CalibrationManifest(method="gaussian"))
    made = Correction(model, images, Watched(functions), build, 1, 0, tolerance)
    options = SimpleNamespace(label="qdq", with_=lambda biases: "changed")
    _, after = made(first, options)
    return made, after == "changed", [feeds["x"] for feeds in measured], seen["second"]


def test_images_that_decide_were_not_corrected_on(monkeypatch, tmp_path):
    same = {name: (lambda x: np.tile(x.mean((1, 2, 3))[:, None], (1, 4))) for name in ("float", "first", "second")}
    for count, first, judges in ((200, 64, 32), (80, 48, 32), (40, 20, 20), (3, 2, 1)):
        folder = tmp_path / str(count)
        folder.mkdir()
        _, _, measured, seen = corrected(monkeypatch, folder, count, same)
        means = np.rint(np.concatenate(measured).mean((1, 2, 3)))
        np.testing.assert_array_equal(means, np.arange(first))
        looked_at = np.rint(np.concatenate(seen).mean((1, 2, 3)))
        own = np.arange(count - judges, count)
        np.testing.assert_array_equal(looked_at, np.concatenate([own, own]))  # as they are, and as noise


def test_a_network_without_batch_norm_is_shown_pictures_without_structure_too(monkeypatch, tmp_path):
    same = {name: (lambda x: x.mean((2, 3))) for name in ("float", "first", "second")}
    _, _, measured, _ = corrected(monkeypatch, tmp_path, 62, same, batch_norms=())
    found = np.concatenate(measured)
    assert len(found) == 31 + 10
    np.testing.assert_array_equal(np.rint(found.mean((1, 2, 3))), [*range(31), *range(10)])
    np.testing.assert_array_equal(found[:31], pictures(62)[:31])
    assert (np.abs(found[31:] - found[:10]).max((1, 2, 3)) > 0.1).all()


def rough(x):
    """How rough pictures are: large for noise."""
    return np.square(np.diff(x, axis=3)).mean((1, 2, 3))


@pytest.mark.parametrize(("on_noise", "kept"), [(0.05, True), (0.8, False)])
def test_a_correction_that_fits_its_own_kind_only_is_rejected(monkeypatch, tmp_path, on_noise, kept):
    scores = np.random.default_rng(0).normal(size=4)

    def output(own, noise):
        return lambda x: scores + np.where(rough(x) > 0.005, noise, own)[:, None] * np.arange(4)

    functions = {"float": output(0, 0), "first": output(0.1, 0.1), "second": output(0.05, on_noise)}
    made, changed, _, _ = corrected(monkeypatch, tmp_path, 40, functions)
    assert changed == kept
    assert bool(made.notes) != kept
    assert ("rejected" in made.rows[0]["reason"]) != kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial"]
