"""Every operator against the ONNX project's own node tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq_deploy.model.ops import OPS
from zsq_deploy.model.ops.types import tensor_from_numpy
from zsq_deploy.model.twin import Twin

sys.path.insert(0, str(Path(__file__).parent))
from node_cases import EXCLUDED, NodeCase, select

#: Cases whose expected values are written down with four decimals.
FOUR_DECIMALS = ("test_gridsample_bicubic", "test_roialign_aligned_false", "test_roialign_aligned_true")

#: Operators of the table that no node test of the range covers; test_against_runtime.py checks them against ONNX Runtime.
NO_NODE_CASE = {
    "ConcatFromSequence",
    "GlobalLpPool",
    "MaxRoiPool",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceLength",
    "SplitToSequence",
}

CASES = select().cases


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_node_case(case: NodeCase) -> None:
    twin = Twin(case.graph, device="cpu")
    for inputs, outputs in case.data:
        feeds = {}
        for name, array in zip(twin.input_names, inputs, strict=True):
            tensor = tensor_from_numpy(array)
            assert tensor is not None
            feeds[name] = tensor
        found = twin.run(feeds)
        for name, array in zip(twin.output_names, outputs, strict=True):
            expected = tensor_from_numpy(array)
            assert expected is not None
            assert found[name].dtype == expected.dtype
            assert found[name].shape == expected.shape
            # two units in the last place of the half types, in which rounding happens after every operator
            rtol = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(expected.dtype, 1e-5)
            atol = 1e-4 if case.name in FOUR_DECIMALS else 1e-6
            np.testing.assert_allclose(
                found[name].to(torch.float64).numpy(), expected.to(torch.float64).numpy(), rtol=rtol, atol=atol
            )


def test_enough_is_run() -> None:
    run = set().union(*(case.operators for case in CASES))
    table = {name for domain, name in OPS if not domain}
    assert table - run == NO_NODE_CASE
    assert len(run & table) >= 140
    assert len(CASES) >= 1300


def test_exclusions_are_about_cases_that_exist() -> None:
    names = {*select().left_out, *(case.name for case in CASES)}
    assert all(any(name.startswith(prefix) for name in names) for prefix in EXCLUDED)
    assert sum(reason in EXCLUDED.values() for reason in select().left_out.values()) == len(EXCLUDED)
