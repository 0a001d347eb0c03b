"""Time and peak memory of one range pass over many large images: 200 against 2,000 images of 3x224x224 through MobileNetV2.

    python tools/bench_ranges.py                     # both sizes, each in its own process
    python tools/bench_ranges.py --images 2000       # one size, in this process

The network is MobileNetV2 (width 1.0) with random weights, written here in torch and exported to ONNX; the images are noise made on
the fly, eight at a time. Printed is the peak resident set of the process (all of it: interpreter, torch, network, statistics).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; with a shortcut where shapes allow."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        ]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1.0."""

    PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        channels = 32
        for expand, width, repeats, stride in self.PLAN:
            for index in range(repeats):
                layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expand))
                channels = width
        layers += [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


def batches(images: int, size: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Noise in batches of eight."""
    rng = np.random.default_rng(0)
    for start in range(0, images, 8):
        yield {"x": rng.standard_normal((min(8, images - start), 3, size, size), np.float32)}


def measure(images: int, size: int, threads: int, micro_batch: int) -> dict[str, float]:
    """Run one pass in this process."""
    torch.set_num_threads(threads)
    from zsq_deploy.model import load_model
    from zsq_deploy.quant import collect

    torch.manual_seed(0)
    network = MobileNetV2().eval()
    model = load_model(network, input_shape=(1, 3, size, size), name="mobilenet_v2")
    graph = model.folded().graph
    name = graph.inputs[0].name
    del network
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    statistics = collect(
        graph, ({name: batch["x"]} for batch in batches(images, size)), device="cpu", micro_batch=micro_batch
    )
    seconds = time.perf_counter() - started
    searched: dict[str, float] = {}
    for method in ("minmax", "percentile", "entropy", "mse"):
        started = time.perf_counter()
        statistics.ranges(method)
        searched[f"{method}_s"] = round(time.perf_counter() - started, 2)
    return {
        "images": images,
        "tensors": len(statistics),
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "peak_rss_mib_before": round(before),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **searched,
    }


def main() -> None:
    """Measure one size here, or both sizes in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=0, help="measure this number of images in this process")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--micro-batch", type=int, default=16, help="images that go through the network at a time")
    options = parser.parse_args()
    if options.images:
        print(json.dumps(measure(options.images, options.size, options.threads, options.micro_batch)))
        return
    rows = []
    for images in (200, 2000):
        command = [sys.executable, __file__, "--images", str(images), "--size", str(options.size)]
        command += ["--threads", str(options.threads), "--micro-batch", str(options.micro_batch)]
        run = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print(f"peak memory: {rows[0]['peak_rss_mib']} MiB for 200 images, {rows[1]['peak_rss_mib']} MiB for 2,000")


if __name__ == "__main__":
    main()
