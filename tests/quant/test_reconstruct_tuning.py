"""The last stage: gradients in closed form, what is learned is what is written, the output comes closer to the float network's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant.reconstruct import Preset, Tuning, reconstruct
from zsq_deploy.quant.reconstruct.api import start
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.images import with_mirror_images, with_shifted_images
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.reconstruct.tuning import SteppedWeight, Tuner, output_error
from zsq_deploy.quant.reconstruct.writing import write

from .nets import images, small_net

BLOCKS = Preset("short", steps=30, batch=16, rounding_lr=3e-2, weight_scale_lr=1e-3, activation_scale_lr=1e-3, drop=0.2)
SHORT = Tuning(steps=80, batch=16, code_lr=2e-3, weight_scale_lr=3e-3, activation_scale_lr=3e-3, bias_lr=3e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return Model(small_net(3), name="small")


@pytest.fixture(scope="module")
def data(model):
    return CalibrationSet.from_arrays({"image": images(48, seed=5)}, CalibrationManifest.of(model, method="gaussian"))


class _Quiet:
    def advance(self, steps=1, **values):
        pass


def tuned(model, data, tuning, bits="w3a3", frozen=lambda state: ()):
    """A tuner that ran, with the state it started from."""
    template, _, state = start(model, data, bits, "ends-8bit", device=torch.device("cpu"))
    runner = Runner(template, torch.device("cpu"))
    tuner = Tuner(runner, state, tuning, seed=1, axes=runner.batch_axes({"image": (3, 12, 12)}), frozen=frozen(state))
    with Cache(len(data)) as cache:
        cache.put("x:image", 0, torch.from_numpy(data.arrays()["image"].copy()))
        tuner.run(cache, len(data), _Quiet())
    return tuner, state


def logits(graph, x):
    with torch.no_grad():
        return Twin(graph, device="cpu")(torch.from_numpy(x)).numpy()


def error(model, graph, x):
    return float(np.square(logits(graph, x) - logits(model.folded().graph, x)).sum())


def test_gradients_of_stepped_weights_are_those_of_straight_through_rounding():
    rng = np.random.default_rng(0)
    u = torch.from_numpy(rng.normal(0, 5, (6, 4))).requires_grad_()
    scale = torch.from_numpy(rng.uniform(0.5, 2, (6, 1))).requires_grad_()
    outer = torch.from_numpy(rng.normal(size=(6, 4)))
    low, high = torch.tensor(-4.0), torch.tensor(3.0)
    SteppedWeight.apply(u, scale, low, high).backward(outer)
    with torch.no_grad():
        codes = u.round().clamp(-4, 3)
        inside = (u.round() >= -4) & (u.round() <= 3)
    np.testing.assert_allclose(u.grad.numpy(), (outer * scale.detach() * inside).numpy(), rtol=1e-12)
    np.testing.assert_allclose(scale.grad.numpy(), (outer * codes).sum(1, keepdim=True).numpy(), rtol=1e-12)
    np.testing.assert_array_equal(SteppedWeight.apply(u, scale, low, high).detach(), (codes * scale).detach())
    assert 0 < inside.sum() < inside.numel()


def test_the_error_of_outputs_does_not_count_what_softmax_does_not_see():
    rng = np.random.default_rng(1)
    wanted = torch.from_numpy(rng.normal(size=(8, 5)))
    assert float(output_error(wanted + 3.0, wanted, 1.0)) == pytest.approx(0.0, abs=1e-12)
    found = wanted + torch.from_numpy(rng.normal(size=(8, 5)))
    gone = (found - wanted).numpy()
    centred = gone - gone.mean(1, keepdims=True)
    assert float(output_error(found, wanted, 2.0)) == pytest.approx(np.square(centred).mean() / 2.0)
    one = torch.ones(4, 1)
    assert float(output_error(one * 3, one, 1.0)) == pytest.approx(4.0)


def test_nothing_changes_at_rates_of_zero_and_codes_stay_where_only_scales_move(model, data):
    still = dataclasses.replace(SHORT, steps=3, code_lr=0.0, weight_scale_lr=0.0, activation_scale_lr=0.0)
    tuner, state = tuned(model, data, dataclasses.replace(still, bias_lr=1e-12))
    after = tuner.learned()
    for name, weight in state.weights.items():
        np.testing.assert_array_equal(after.weights[name].codes, weight.codes)
        np.testing.assert_array_equal(after.weights[name].scale, weight.scale)
    assert {k: a.scale for k, a in after.activations.items()} == pytest.approx(
        {k: a.scale for k, a in state.activations.items()}, rel=1e-6
    )
    tuner, state = tuned(model, data, dataclasses.replace(SHORT, steps=10, code_lr=0.0))
    moved = tuner.learned()
    assert all(np.array_equal(moved.weights[name].codes, state.weights[name].codes) for name in state.weights)
    assert any(not np.array_equal(moved.weights[name].scale, state.weights[name].scale) for name in state.weights)


def test_frozen_scales_stay_and_the_others_move(model, data):
    def eight(state):
        return {group for group, one in state.activations.items() if one.scheme.bits == 8}

    tuner, state = tuned(model, data, dataclasses.replace(SHORT, steps=10), frozen=eight)
    after = tuner.learned()
    moved = {group for group, one in state.activations.items() if after.activations[group] != one}
    assert eight(state)
    assert moved
    assert not moved & eight(state)


def test_the_graph_computes_what_was_tuned(model, data):
    tuner, state = tuned(model, data, dataclasses.replace(SHORT, code_lr=2e-2))
    after = tuner.learned()
    x = images(16, seed=7)
    with torch.no_grad():
        wanted = next(iter(tuner.outputs({"image": torch.from_numpy(x)}).values())).numpy()
    found = logits(write(tuner.runner.template, after), x)
    # biases are int32 in the graph, and a code at the edge of its cell may fall on either side
    step = max(a.scale for a in after.activations.values())
    assert np.abs(found - wanted).max() < 2 * step
    assert np.square(found - wanted).mean() < 0.02 * np.square(wanted - logits(model.folded().graph, x)).mean()
    flipped = np.mean([np.mean(after.weights[n].codes != state.weights[n].codes) for n in state.weights])
    assert 0 < flipped < 0.2
    for weight in after.weights.values():
        assert weight.codes.min() >= weight.scheme.qmin
        assert weight.codes.max() <= weight.scheme.qmax


def test_tuned_outputs_are_closer_on_images_that_were_not_seen(model, data):
    fresh = images(64, seed=99)
    without = reconstruct(model, data, "w3a3", "ends-8bit", BLOCKS)
    with_ = reconstruct(model, data, "w3a3", "ends-8bit", dataclasses.replace(BLOCKS, tuning=SHORT))
    assert error(model, with_.graph, fresh) < 0.9 * error(model, without.graph, fresh)


def test_a_tuned_network_is_kept_and_comes_again(model, data, tmp_path):
    preset = dataclasses.replace(BLOCKS, steps=10, mirror=True, tuning=dataclasses.replace(SHORT, steps=10))
    first = reconstruct(model, data, "w4a4", "ends-8bit", preset, workdir=tmp_path / "w")
    files = sorted(path.name for path in (tmp_path / "w").glob("block-*.npz"))
    assert len(files) == len(first.blocks) + 1 - sum(not block.layers for block in first.blocks)
    again = reconstruct(model, data, "w4a4", "ends-8bit", preset)
    assert again.graph.digest == first.graph.digest
    (tmp_path / "w" / files[-1]).unlink()
    resumed = reconstruct(model, data, "w4a4", "ends-8bit", preset, workdir=tmp_path / "w", resume=True)
    assert resumed.graph.digest == first.graph.digest
    kept = reconstruct(model, data, "w4a4", "ends-8bit", preset, workdir=tmp_path / "w", resume=True)
    assert kept.graph.digest == first.graph.digest
    plain = reconstruct(model, data, "w4a4", "ends-8bit", dataclasses.replace(preset, tuning=None))
    assert plain.graph.digest != first.graph.digest


def test_mirror_images_follow_the_images(data):
    both = with_mirror_images(data)
    x = data.arrays()["image"]
    found = np.concatenate([batch["image"] for batch in both.batches(20)])
    assert len(both) == len(found) == 2 * len(data)
    np.testing.assert_array_equal(found[: len(x)], x)
    np.testing.assert_array_equal(found[len(x) :], x[..., ::-1])
    assert both.digest != data.digest


def test_shifted_images_are_the_same_however_the_set_is_cut(data):
    more = with_shifted_images(data, 2, seed=3)
    x = data.arrays()["image"]
    found = np.concatenate([batch["image"] for batch in more.batches(20)])
    assert len(more) == len(found) == 3 * len(data)
    np.testing.assert_array_equal(found, np.concatenate([batch["image"] for batch in more.batches(7)]))
    np.testing.assert_array_equal(found[: len(x)], x)
    seen = set()
    for number, moved in enumerate(found[len(x) :]):  # 12 pixels: at most one to each side
        image = np.pad(x[number % len(x)], ((0, 0), (1, 1), (1, 1)), mode="reflect")
        fits = [(a, b) for a in range(3) for b in range(3) if np.array_equal(moved, image[:, a : a + 12, b : b + 12])]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 9
    assert with_shifted_images(data, 2, seed=4).digest != more.digest
    assert with_shifted_images(data, 0, seed=3) is data


def test_what_is_no_colour_picture_has_no_mirror_image():
    class Spectra:
        digest = "s"

        def __len__(self):
            return 4

        def batches(self, size):
            yield {"x": np.zeros((4, 1, 49, 10), np.float32)}

    spectra = Spectra()
    assert with_mirror_images(spectra) is spectra
    assert with_shifted_images(spectra, 2, seed=0) is spectra


def test_gradients_are_the_same_however_many_images_go_through_at_a_time(model, data):
    template, _, state = start(model, data, "w3a3", "ends-8bit", device=torch.device("cpu"))
    runner = Runner(template, torch.device("cpu"))
    tuner = Tuner(runner, state, SHORT, seed=1, axes=runner.batch_axes({"image": (3, 12, 12)}))
    chosen = np.array([0, 3, 4, 7, 11, 20, 21, 40, 41, 47, 30])
    with Cache(len(data)) as cache:
        cache.put("x:image", 0, torch.from_numpy(data.arrays()["image"].copy()))
        tuner._teach(cache, len(data))
        leaves = [part.steps for part in tuner.parts] + [part.factor for part in tuner.parts]
        leaves += [part.bias_shift for part in tuner.parts if part.bias_shift is not None]
        leaves += list(tuner.factors.values())

        # as a whole, through torch's own graph
        found = tuner.outputs({"image": cache.take("x:image", chosen)})
        losses = [
            output_error(found[name], cache.take(f"t:{name}", chosen), unit) for name, unit in tuner.units.items()
        ]
        wanted = torch.autograd.grad(sum(losses), leaves)
        for piece in (11, 4, 1):
            for leaf in leaves:
                leaf.grad = None
            value = tuner.accumulate(cache, chosen, piece)
            assert value == pytest.approx(float(sum(losses).detach()), rel=1e-5)
            for leaf, gradient in zip(leaves, wanted, strict=True):
                torch.testing.assert_close(
                    leaf.grad, gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-9
                )
        assert any(gradient.abs().max() > 0 for gradient in wanted)


def test_large_activations_go_through_in_small_pieces(model, data, monkeypatch):
    template, _, state = start(model, data, "w4a4", "ends-8bit", device=torch.device("cpu"))
    runner = Runner(template, torch.device("cpu"))
    tuner = Tuner(runner, state, SHORT, seed=1, axes=runner.batch_axes({"image": (3, 12, 12)}))
    with Cache(len(data)) as cache:
        cache.put("x:image", 0, torch.from_numpy(data.arrays()["image"].copy()))
        assert tuner.piece(cache) == SHORT.batch
        size = runner.activation_bytes({"image": cache.take("x:image", np.arange(1))})
        assert runner.activation_bytes({"image": cache.take("x:image", np.arange(4))}) == pytest.approx(
            4 * size, rel=0.01
        )
        assert size > 5 * 8 * 12 * 12 * 4  # some planes of the full size
        monkeypatch.setattr("zsq_deploy.quant.reconstruct.tuning._HELD", 5 * size + 1)
        assert tuner.piece(cache) == 5
        monkeypatch.setattr("zsq_deploy.quant.reconstruct.tuning._HELD", 1)
        assert tuner.piece(cache) == 1
