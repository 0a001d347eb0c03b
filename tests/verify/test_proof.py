"""The integer share is arithmetic on the runtime's records."""

from __future__ import annotations

import pytest

from zsq_deploy.backends.base import KernelRecord
from zsq_deploy.verify.proof import prove

RECORDS = [
    KernelRecord("conv1_quant", "QLinearConv", True, 30.0, ("conv1", "relu1"), 900),
    KernelRecord("conv2_quant", "QLinearConv", True, 20.0, ("conv2",), 50),
    KernelRecord("fc", "Gemm", False, 10.0, ("fc",), 50, "no integer kernel for this type"),
    KernelRecord("in_q", "QuantizeLinear", False, 40.0),
]


def test_shares_are_weighted_by_work_and_by_time():
    proof = prove(RECORDS)
    assert (proof.macs, proof.integer_macs) == (1000, 950)
    assert proof.macs_share == 0.95
    assert proof.time_share == 0.5
    assert [(k.op, k.nodes, k.macs, k.microseconds) for k in proof.kernels] == [
        ("QLinearConv", 2, 950, 50.0),
        ("QuantizeLinear", 1, 0, 40.0),
        ("Gemm", 1, 50, 10.0),
    ]
    assert [(i.node, i.reason) for i in proof.islands] == [
        ("fc", "no integer kernel for this type"),
        ("in_q", "the runtime gives no reason"),
    ]
    assert sum(k["microseconds"] for k in proof.to_json()["kernels"]) == pytest.approx(proof.microseconds)


def test_one_kernel_in_both_arithmetics_is_two_rows():
    proof = prove([KernelRecord("a", "MatMul", True, 1.0, macs=5), KernelRecord("b", "MatMul", False, 1.0, macs=5)])
    assert {(k.op, k.integer) for k in proof.kernels} == {("MatMul", True), ("MatMul", False)}
    assert proof.macs_share == 0.5


def test_nothing_executed_has_no_share():
    proof = prove([])
    assert proof.macs_share is None
    assert proof.time_share is None
