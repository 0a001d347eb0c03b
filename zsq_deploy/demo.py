"""The embedded example: a small convolutional network with batch normalization, trained here on handwritten digits.

The data are the 1,797 digits that scikit-learn carries (UCI ML hand-written digits, Alpaydin and Kaynak 1998), enlarged from
8x8 to 32x32. Three quarters train the network; the rest is held out and only evaluates the engines. Quantization sees none of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.artifact import atomic_path
from zsq_deploy.progress import SILENT, Progress

__all__ = ["DEMO_MEAN", "DEMO_STD", "DigitNetwork", "TrainedDemo", "digits_network", "load_digits_32", "train_demo"]

DEMO_MEAN = (0.30,)
DEMO_STD = (0.33,)


class _Residual(nn.Module):
    """A residual block: depthwise 3x3 between two pointwise convolutions, each with batch normalization."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.spatial = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.reduce = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.expand(x)))
        y = F.relu(self.bn2(self.spatial(y)))
        out: Tensor = x + self.bn3(self.reduce(y))
        return out


class DigitNetwork(nn.Module):
    """Input: gray images [N, 1, 32, 32]; output: logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.down1 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.down1_bn = nn.BatchNorm2d(64)
        self.block1 = _Residual(64, 128)
        self.down2 = nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False)
        self.down2_bn = nn.BatchNorm2d(96)
        self.block2 = _Residual(96, 192)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.block1(F.relu(self.down1_bn(self.down1(x))))
        x = self.block2(F.relu(self.down2_bn(self.down2(x))))
        logits: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), 1), 1))
        return logits


def digits_network() -> DigitNetwork:
    """The untrained network, as ``zsq deploy zsq_deploy.demo:digits_network --weights ...`` takes it."""
    return DigitNetwork()


def load_digits_32() -> tuple[np.ndarray, np.ndarray]:
    """The digits as ``uint8`` [1797, 32, 32, 1] and their labels ``int64`` [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(np.asarray(digits.images, np.float32) / 16.0 * 255.0)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = large.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(pixels), np.asarray(digits.target, np.int64)


@dataclass(frozen=True)
class TrainedDemo:
    """Files of the trained example: weights (safetensors), held-out labelled data (npz), and how well it does in float."""

    weights: Path
    eval_data: Path
    float_accuracy: float
    seconds: float


def train_demo(folder: Path, *, epochs: int = 6, seed: int = 0, progress: Progress = SILENT) -> TrainedDemo:
    """Train the example network and write its weights and held-out data into `folder`.

    Args:
        folder: Where `digits.safetensors` and `digits_heldout.npz` go.
        epochs: Passes over the 1,347 training digits.
        seed: Seed of the split, the initial weights and the order of batches.
        progress: Where progress is reported.
    """
    started = time.monotonic()
    pixels, labels = load_digits_32()
    order = np.random.default_rng(seed).permutation(len(labels))
    train, held = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    mean, std = DEMO_MEAN[0], DEMO_STD[0]
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    y = torch.from_numpy(labels)

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitNetwork()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = 64
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.15, total_steps=steps)
    train_index = torch.from_numpy(train)
    with progress.task("train the example network", steps) as task:
        for _ in range(epochs):
            shuffled = train_index[torch.randperm(len(train_index), generator=generator)]
            for start in range(0, len(shuffled) - batch + 1, batch):
                pick = shuffled[start : start + batch]
                shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
                images = torch.roll(x[pick], shift, (2, 3)).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(network(images), y[pick])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                task.advance(1, loss=float(loss.detach()))
    network.eval()
    held_index = torch.from_numpy(held)
    with torch.no_grad():
        accuracy = float((network(x[held_index]).argmax(1) == y[held_index]).float().mean())

    folder.mkdir(parents=True, exist_ok=True)
    weights, data = folder / "digits.safetensors", folder / "digits_heldout.npz"
    with atomic_path(weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, temporary)
    with atomic_path(data) as temporary:
        np.savez_compressed(temporary, x=pixels[held], y=labels[held])
    return TrainedDemo(weights, data, accuracy, time.monotonic() - started)
