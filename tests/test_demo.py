"""The embedded example: real digits, training that can be repeated, and a held-out part that training never sees."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from zsq_deploy.demo import load_digits_32, train_demo


def test_digits():
    pixels, labels = load_digits_32()
    assert pixels.shape == (1797, 32, 32, 1)
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255
    assert np.bincount(labels).min() > 150


def test_training_can_be_repeated_and_leaves_the_held_out_part_alone(tmp_path):
    first, second = (train_demo(tmp_path / name, epochs=1, seed=3) for name in ("a", "b"))
    assert first.weights.read_bytes() == second.weights.read_bytes()
    assert first.eval_data.read_bytes() == second.eval_data.read_bytes()
    weights = load_file(first.weights)
    assert np.isfinite(weights["stem.weight"]).all()
    assert 0.15 < first.float_accuracy <= 1
    pixels, labels = load_digits_32()
    order = np.random.default_rng(3).permutation(len(labels))
    with np.load(first.eval_data) as held:
        np.testing.assert_array_equal(held["x"], pixels[order[len(order) * 3 // 4 :]])
        np.testing.assert_array_equal(held["y"], labels[order[len(order) * 3 // 4 :]])
