"""What building a twin costs over the eager torch module: time of a forward pass, and of one with its gradient.

    python tools/bench_twin.py MODULE:CALLABLE [--path DIR] [--input-shape 32x3x32x32] [--rounds 40]

Both forms run in turn, so that a busy machine disturbs both alike; medians and lower deciles in milliseconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zsq_deploy.model import load_model


def _forward(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        net(x)


def _backward(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    net(x).sum().backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time the twin of a torch module against the module itself.")
    parser.add_argument("source", help="module:callable that makes the network")
    parser.add_argument("--path", default=".", help="folder of the module")
    parser.add_argument("--input-shape", default="32x3x32x32")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sys.path.insert(0, options.path)
    module, _, name = options.source.partition(":")
    eager: nn.Module = getattr(importlib.import_module(module), name)().eval().requires_grad_(False)
    shape = tuple(int(size) for size in options.input_shape.split("x"))
    twin = load_model(eager, input_shape=(1, *shape[1:])).twin(device="cpu")
    x = torch.randn(shape)
    jobs: dict[str, Callable[[nn.Module, Tensor], None]] = {"forward": _forward, "forward and gradient": _backward}
    for title, job in jobs.items():
        times: dict[str, list[float]] = {"eager": [], "twin": []}
        for _ in range(options.rounds):
            for kind, net in (("eager", eager), ("twin", twin)):
                start = time.perf_counter()
                job(net, x)
                times[kind].append((time.perf_counter() - start) * 1e3)
        line = []
        for kind, values in times.items():
            values.sort()
            line.append(f"{kind} {values[len(values) // 2]:8.2f} ms (lower decile {values[len(values) // 10]:8.2f})")
        ratio = times["twin"][options.rounds // 10] / times["eager"][options.rounds // 10]
        print(f"{title:21s} {line[0]}  {line[1]}  ratio of lower deciles {ratio:.3f}")


if __name__ == "__main__":
    main()
