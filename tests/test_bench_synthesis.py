"""tools/bench_synthesis.py: every method's loss is the one written down from its paper, and the table says what was raced."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.model import Preprocess, load_model

TOOLS = Path(__file__).parent.parent / "tools"
SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def bench() -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module("bench_synthesis")


class Residual(nn.Module):
    """Three batch norms, one of them in front of a sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(x + self.inner_norm(self.inner(x)))
        return self.head(torch.relu(self.last_norm(self.last(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def case(bench: Any) -> Callable[[str], Any]:
    torch.manual_seed(0)
    network = Residual().train()
    with torch.no_grad():
        for _ in range(20):
            network(nn.functional.interpolate(torch.randn(16, 3, 4, 4), size=SIZE[1:], mode="bilinear"))
        for norm in (network.norm, network.inner_norm, network.last_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    network.eval().requires_grad_(requires_grad=False)
    model = load_model(network, input_shape=(1, *SIZE), preprocess=Preprocess((0.5,) * 3, (0.5,) * 3))
    return lambda method: bench.Case(method, network, model, SIZE, 6)


def test_every_method_that_optimises_is_raced(bench: Any) -> None:
    assert set(bench.LOSSES) == {name for name, method in METHODS.items() if method.run is not None}


@pytest.mark.parametrize(
    "method",
    [
        "zeroq",
        "genie",
        "kw",
        "dsg",
        "intraq",
        "hast",
        "deepinversion",
        "fast",
        "dgh",
        "mixmix",
        "texq",
        "synq",
        "sadag",
    ],
)
def test_the_loss_is_the_one_that_was_written_down(bench: Any, case: Callable[[str], Any], method: str) -> None:
    """Value and gradient over several draws of the random choices."""
    precision = torch.float64 if method == "sadag" else torch.float32
    run, plain, _ = case(method).sides(precision)
    for _ in range(4):
        for tensor in (*plain.parameters(), *(t for group in run.parametrisation.groups().values() for t in group)):
            tensor.grad = None
        error, gradient_error = bench.compared(run, plain)
        assert error < 1e-4
        assert gradient_error < 1e-2


def test_another_loss_is_refused(bench: Any, case: Callable[[str], Any]) -> None:
    run, plain, _ = case("fast").sides()
    plain.method = "dgh"
    plain.given["options"] = {**plain.given["options"], "output_weight": 0.1}
    with pytest.raises(SystemExit, match="not the same loss"):
        bench.compared(run, plain)


def test_the_table_names_stage_and_ratio(bench: Any, case: Callable[[str], Any]) -> None:
    result = bench.measured(case("texq"), rounds=1, threads=1)
    assert result["stage"] == "generator"
    assert result["clock"] == "process"
    assert result["ratio"] == pytest.approx(
        result["image_steps_per_second"] / result["plain_image_steps_per_second"], rel=1e-6
    )
    row = bench.table([result]).splitlines()[2]
    assert row.startswith(f"| texq (generator) | 6 | {result['plain_image_steps_per_second']:.0f} |")
