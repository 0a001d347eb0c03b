"""Steps per second of block reconstruction, beside the plain eager formulation of the same loss on the same batches.

    python tools/bench_reconstruct.py                          # ResNet-18 at 224 and ResNet-20 at 32, one thread
    python tools/bench_reconstruct.py --network resnet20 --steps 40 --rounds 5
    python tools/bench_reconstruct.py --network resnet18-blocks --batch 16 # one block of each stage of ResNet-18 alone: no pass through the whole network
    python tools/bench_reconstruct.py --network resnet18 --peak-memory --images 1024   # memory of a whole reconstruction instead

The plain formulation is how released code writes it down: activations in NCHW, every quantizer a chain of torch operators
(straight-through rounding, ``rand_like`` masks), soft weights and regulariser computed separately and differentiated by torch, one Adam for
the rounding and one for the scales. Both run the same block of the same network through the same twin with the same quantizers; a step is
draw, forward, backward, update. The two take turns; printed are the medians of steps per second of processor time (on a busy machine
wall time says little), and the wall times beside them. Networks have random weights, images are noise.

``--peak-memory`` runs ``reconstruct`` with few steps (memory does not depend on their number) on images in a folder, and prints the largest anonymous memory of
the process (what cannot be dropped) and the largest resident memory (with the pages of mapped files, which the system drops when others want it).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import resnet18
from torch import Tensor, nn

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model import load_model
from zsq_deploy.progress import SILENT, Task
from zsq_deploy.quant.reconstruct import PRESETS, reconstruct
from zsq_deploy.quant.reconstruct.api import start
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.learn import BlockLearner, channel_axis
from zsq_deploy.quant.reconstruct.quantizers import Range, initial_logits
from zsq_deploy.quant.reconstruct.work import Work


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(a, outputs, 3, s, 1, bias=False), nn.BatchNorm2d(outputs))
            for a, s in ((inputs, stride), (outputs, 1))
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))


def resnet20() -> nn.Module:
    """He et al. 2016, section 4.2, with 1x1 convolutions as projections."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        layers += [_Residual(inputs, outputs, 2 if inputs != outputs else 1)]
        layers += [_Residual(outputs, outputs, 1) for _ in range(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def one_block(channels: int) -> nn.Module:
    """A residual block of some channels, behind what makes as many of an image's."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*stem, _Residual(channels, channels, 1), *head).eval()


def _round_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


class Plain:
    """The eager formulation of what a :class:`BlockLearner` learns."""

    def __init__(self, learner: BlockLearner, cache: Cache, images: int) -> None:
        self.learner, self.preset = learner, learner.preset
        every = np.arange(images)
        block = learner.block
        self.rounded = {name: cache.take(f"q:{name}", every).contiguous() for name in block.inputs}
        self.exact = {
            name: cache.take(f"f:{name}", every).contiguous() if f"f:{name}" in cache else self.rounded[name]
            for name in block.inputs
        }
        self.wanted = {name: cache.take(f"f:{name}", every).contiguous() for name in block.outputs}
        self.layers = []
        for layer in learner.runner.layers(block):
            weight = learner.state.weights[layer.node]
            w = torch.from_numpy(np.array(learner.runner.template.weights[layer.weight]))
            scale = torch.from_numpy(np.array(weight.along(weight.scale)))
            base, logits = initial_logits(w, scale)
            limits = (weight.scheme.qmin, weight.scheme.qmax)
            bias = torch.from_numpy(np.array(learner.state.biases[layer.node])) if layer.bias else None
            self.layers.append((layer, base, logits.requires_grad_(), scale.requires_grad_(), limits, bias))
        self.scales = {
            group: torch.tensor(learner.state.activations[group].scale, requires_grad=True)
            for group in learner.groups()
        }
        self.rounding = torch.optim.Adam([item[2] for item in self.layers], lr=self.preset.rounding_lr)
        self.others = torch.optim.Adam(
            [
                {"params": [item[3] for item in self.layers], "lr": self.preset.weight_scale_lr},
                {"params": list(self.scales.values()), "lr": self.preset.activation_scale_lr},
            ]
        )

    @staticmethod
    def _soft(logits: Tensor) -> Tensor:
        return torch.clamp(torch.sigmoid(logits) * 1.2 - 0.1, 0.0, 1.0)

    def _quantizer(self, scale: Tensor, limits: Range) -> Callable[[Tensor], Tensor]:
        def rounded(x: Tensor) -> Tensor:
            x = x.clamp(limits.floor, limits.ceiling)
            y = torch.clamp(_round_through(x / scale), limits.low, limits.high) * scale
            return torch.where(torch.rand_like(x) < self.preset.drop, x, y)

        return rounded

    def step(self, chosen: Any, strength: float, beta: float) -> None:
        """One step."""
        index = torch.from_numpy(chosen)
        inputs = {}
        for name, rounded in self.rounded.items():
            x, exact = rounded[index], self.exact[name][index]
            inputs[name] = torch.where(torch.rand_like(x) < self.preset.drop, exact, x)
        constants: dict[str, Tensor] = {}
        for layer, base, logits, scale, (low, high), bias in self.layers:
            constants[layer.weight] = torch.clamp(base + self._soft(logits), low, high) * scale
            if bias is not None:
                constants[layer.bias] = bias
        learner = self.learner
        taps = {
            site.output: self._quantizer(
                self.scales[site.group], learner.state.activations[site.group].limits(site.floor, site.ceiling)
            )
            for site in learner.sites
        }
        found = learner.runner.learning(learner.block, inputs, constants, taps)
        loss = torch.zeros(())
        for name, y in found.items():
            loss = loss + (y - self.wanted[name][index]).abs().pow(2.0).sum(channel_axis(y, 0)).mean()
        for _, _, logits, _, _, _ in self.layers:
            loss = loss + strength * (1.0 - (2.0 * self._soft(logits) - 1.0).abs().pow(beta)).sum()
        self.rounding.zero_grad()
        self.others.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.rounding.step()
        self.others.step()


@dataclass(frozen=True)
class Row:
    """Steps per second of one block.

    Attributes:
        block: Its name.
        plain: Eager formulation, steps per second of processor time.
        ours: Block reconstruction.
        plain_wall: The same per second of wall time.
        ours_wall: The same.
    """

    block: str
    plain: float
    ours: float
    plain_wall: float
    ours_wall: float


def _timed(work: Callable[[], None], steps: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return steps / (time.process_time() - cpu), steps / (time.perf_counter() - wall)


def measure(
    network: nn.Module,
    size: int,
    *,
    images: int,
    batch: int,
    steps: int,
    rounds: int,
    blocks: Mapping[int, str] | None = None,
) -> list[Row]:
    """Both formulations on the blocks of one network.

    Args:
        network: In evaluation mode.
        size: Height and width of its input.
        images: Number of noise images.
        batch: Images a step.
        steps: Steps a turn.
        rounds: Turns.
        blocks: Number of block -> name to print; ``None``: all blocks with weights.
    """
    model = load_model(network, input_shape=(1, 3, size, size))
    name = model.inputs[0].name
    noise = np.random.default_rng(0).normal(size=(images, 3, size, size)).astype(np.float32)
    data = CalibrationSet.from_arrays({name: noise}, CalibrationManifest.of(model, method="gaussian"))
    preset = PRESETS["full"]
    template, _, state = start(model, data, "w4a4", "ends-8bit", device=torch.device("cpu"))
    rows: list[Row] = []
    seen = [0]

    def learn(learner: BlockLearner, cache: Cache, count: int, task: Task) -> float:
        del task
        number, seen[0] = seen[0], seen[0] + 1
        if not learner.layers or (blocks is not None and number not in blocks):
            return 0.0
        plain = Plain(learner, cache, count)
        stepper = learner.stepper(cache)
        rng = np.random.default_rng(1)
        found: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for turn in range(rounds + 1):
            chosen = [np.sort(rng.choice(count, min(batch, count), replace=False)) for _ in range(steps)]

            def eager(chosen: list[Any] = chosen) -> None:
                for item in chosen:
                    plain.step(item, 1.0, 10.0)

            def ours(chosen: list[Any] = chosen, first: int = turn * steps) -> None:
                for offset, item in enumerate(chosen):
                    stepper.step(item, first + offset, strength=1.0, beta=10.0, falling=1.0)

            pair = _timed(eager, steps), _timed(ours, steps)
            if turn:  # the first turn warms up
                found.append(pair)
        middle = [statistics.median(pair[which][kind] for pair in found) for which in (0, 1) for kind in (0, 1)]
        label = learner.block.name if blocks is None else blocks[number]
        rows.append(Row(label, middle[0], middle[2], middle[1], middle[3]))
        return 0.0

    with Cache(images) as cache:
        Work(template, state, preset, 0, torch.device("cpu"), cache, None, SILENT, learn).run(data)
    return rows


def _status(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class _Watch(threading.Thread):
    """Looks at the memory of the process ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done`."""
        while not self.done.wait(0.1):
            self.anonymous = max(self.anonymous, _status("RssAnon"))
            self.resident = max(self.resident, _status("VmRSS"))


def peak_memory(network: nn.Module, size: int, *, images: int, steps: int, memory: int) -> tuple[int, int, int]:
    """Bytes of a whole reconstruction with the preset `fast`: before it, largest anonymous, largest resident.

    Args:
        network: In evaluation mode.
        size: Height and width of its input.
        images: Number of noise images.
        steps: Steps a block, and of the tuning.
        memory: Bytes of activations that may stay in memory.
    """
    model = load_model(network, input_shape=(1, 3, size, size))
    fast = PRESETS["fast"]
    assert fast.tuning is not None
    preset = dataclasses.replace(fast, steps=steps, tuning=dataclasses.replace(fast.tuning, steps=steps))
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).normal(size=(images, 3, size, size)).astype(np.float32)
        manifest = CalibrationManifest.of(model, method="gaussian")
        CalibrationSet.from_arrays({model.inputs[0].name: noise}, manifest).save(Path(folder) / "set")
        del noise
        data = CalibrationSet.open(Path(folder) / "set")
        before = _status("RssAnon")
        watch = _Watch()
        watch.start()
        reconstruct(model, data, "w4a4", "ends-8bit", preset, workdir=Path(folder) / "work", memory=memory)
        watch.done.set()
        watch.join()
    return before, watch.anonymous, watch.resident


Entry = tuple[Callable[[], nn.Module], int, int, dict[int, str]]
"""Network, size of its images, how many, and the blocks that are measured."""

BLOCKS: dict[str, Entry] = {
    f"resnet18 {channels}x{size}x{size}": (
        partial(one_block, channels),
        size,
        64,
        {1: f"resnet18 {channels}x{size}x{size}"},
    )
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
}

NETWORKS: dict[str, Entry] = {
    "resnet20": (
        resnet20,
        32,
        128,
        {1: "resnet20 16x32x32", 5: "resnet20 32x16x16", 8: "resnet20 64x8x8"},
    ),
    "resnet18": (
        resnet18,
        224,
        64,
        {1: "resnet18 64x56x56", 4: "resnet18 128x28x28", 6: "resnet18 256x14x14", 8: "resnet18 512x7x7"},
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted([*NETWORKS, "resnet18-blocks"]), action="append")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn; with --peak-memory 2 are taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--images", type=int, default=1024, help="with --peak-memory")
    parser.add_argument("--memory-mib", type=int, default=512, help="with --peak-memory: activations kept in memory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_memory:
        for name in given.network or ["resnet18"]:
            make, size, _, _ = NETWORKS[name]
            found = peak_memory(make(), size, images=given.images, steps=2, memory=given.memory_mib << 20)
            before, anonymous, resident = (each / 2**20 for each in found)
            print(
                f"{name}, {given.images} images: {anonymous:.0f} MiB anonymous ({before:.0f} before), {resident:.0f} MiB resident"
            )
        return
    print(f"{'block':24}{'plain':>10}{'ours':>10}{'ratio':>8}   steps/s of processor time (wall: plain, ours)")
    wanted = given.network or ["resnet20", "resnet18"]
    entries = [one for name in wanted for one in (BLOCKS.values() if name == "resnet18-blocks" else [NETWORKS[name]])]
    for make, size, images, blocks in entries:
        for row in measure(
            make(), size, images=images, batch=given.batch, steps=given.steps, rounds=given.rounds, blocks=blocks
        ):
            print(
                f"{row.block:24}{row.plain:10.1f}{row.ours:10.1f}{row.ours / row.plain:8.2f}"
                f"   ({row.plain_wall:.1f}, {row.ours_wall:.1f})"
            )


if __name__ == "__main__":
    main()
