"""The shift with the least error behind an activation function, against a search over all shifts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.shifts import bounds_behind, least_squares_shift, sampled


def noisy(seed, channels=6, places=4000):
    """A float channel, and what coarse weights make of it: weaker, shifted, noisy."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.uniform(-2, 1, (channels, 1)), 1, (channels, places))
    found = 0.8 * x + rng.uniform(-0.5, 0.5, (channels, 1)) + rng.normal(0, 0.3, x.shape)
    return x, found


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 1.5), (-0.5, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_no_shift_is_better(seed, bounds):
    x, found = noisy(seed)
    wanted = np.clip(x, *bounds)
    shift = least_squares_shift(torch.tensor(found), torch.tensor(wanted), *bounds).numpy()

    def error(s):
        return np.square(np.clip(found + s[:, None], *bounds) - wanted).mean(1)

    def asked(s):
        return error(s) + 16 * s**2 / 4000  # sixteen places more that vote for none

    everywhere = np.stack([asked(np.full(len(x), s)) for s in np.linspace(-2, 2, 801)])
    assert (asked(shift) <= everywhere.min(0) * 1.005 + 1e-6).all()
    assert (error(shift) <= error(np.zeros(len(x)))).all()
    assert error(shift).sum() < 0.97 * error(np.zeros(len(x))).sum()


def test_where_nothing_is_cut_it_is_the_difference_of_the_means():
    x, found = noisy(5)
    shift = least_squares_shift(torch.tensor(found), torch.tensor(x), -math.inf, math.inf).numpy()
    np.testing.assert_allclose(shift, (x - found).mean(1) * 4000 / 4016, atol=1e-9)


def test_a_channel_that_never_answers_stays():
    silent = torch.full((1, 500), -3.0)
    assert least_squares_shift(silent, torch.zeros(1, 500), 0.0, math.inf).item() == 0.0


def test_a_channel_that_hardly_ever_answers_hardly_moves():
    found = torch.full((1, 4096), -3.0)
    found[0, 0] = 1.0
    wanted = torch.zeros(1, 4096)
    wanted[0, 0] = 2.0
    assert 0.0 < least_squares_shift(found, wanted, 0.0, math.inf).item() < 0.1


def test_the_cut_into_batches_does_not_matter():
    x = torch.randn(20, 3, 17, 19)
    whole = sampled(x, 0, 500)
    parts = torch.cat([sampled(x[:7], 0, 500), sampled(x[7:], 7, 500)], 1)
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)
    assert whole.shape == (3, 20 * 8)


def test_places_are_places_of_the_images_and_differ():
    number = torch.arange(4 * 15 * 15, dtype=torch.float32).reshape(4, 1, 15, 15)
    found = sampled(number, 0, 400)[0]
    assert len(set(found.tolist())) == len(found) == 4 * 10
    image, place = found // 225, found % 225
    assert image.tolist() == sorted(image.tolist())
    assert len({tuple(place[image == i].tolist()) for i in range(4)}) == 4


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 4, 6)])
def test_small_activations_are_taken_whole(shape):
    x = torch.randn(shape)
    found = sampled(x, 0, 5)
    wanted = x.movedim(1, 0).reshape(3, -1)
    torch.testing.assert_close(found.sort(1).values, wanted.sort(1).values, rtol=0, atol=0)


def graph_of(nodes, arrays=(), outputs=("z",)):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 3))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 3)) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays],
    )
    return Graph(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_what_the_reader_lets_through():
    relu = graph_of([helper.make_node("Relu", ["y"], ["z"])])
    assert bounds_behind(relu, "y", {}) == (0.0, math.inf)
    assert bounds_behind(relu, "y", {"z": (-1.0, 4.0)}) == (0.0, 4.0)
    clip = graph_of([helper.make_node("Clip", ["y", "low", "high"], ["z"])], [("low", 0.0), ("high", 6.0)])
    assert bounds_behind(clip, "y", {"z": (0.0, 5.5)}) == (0.0, 5.5)
    half = graph_of([helper.make_node("Clip", ["y", "", "high"], ["z"])], [("high", 6.0)])
    assert bounds_behind(half, "y", {}) == (-math.inf, 6.0)


def test_other_readers_want_the_mean():
    tanh = graph_of([helper.make_node("Tanh", ["y"], ["z"])])
    assert bounds_behind(tanh, "y", {}) is None
    two = graph_of([helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Tanh", ["y"], ["t"])], (), ("z", "t"))
    assert bounds_behind(two, "y", {}) is None
