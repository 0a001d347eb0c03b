"""Networks of well-known sizes with random weights, written by hand for the benchmarks (no download, no torchvision).

Convolutions, batch norm and activations are those of the papers (He et al. 2016, table 1, ResNet-18; Sandler et al. 2018, table 2,
MobileNetV2 1.0); batch-norm statistics are drawn at random, so that folding has something to do.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["mobilenet_v2", "resnet18"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class _Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(inputs, outputs, 3, stride), nn.ReLU(), *_conv(outputs, outputs, 3))
        self.short = nn.Sequential(*_conv(inputs, outputs, 1, stride)) if stride > 1 or inputs != outputs else None
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x) + (x if self.short is None else self.short(x)))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inputs * factor
        layers: list[nn.Module] = []
        if factor > 1:
            layers += [*_conv(inputs, wide, 1), nn.ReLU6()]
        layers += [*_conv(wide, wide, 3, stride, groups=wide), nn.ReLU6(), *_conv(wide, outputs, 1)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _settle(network: nn.Module, seed: int, size: int) -> nn.Module:
    """Random weights with batch-norm statistics measured on noise, so that activations stay in a normal range."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.6, 1.2)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(4, 3, size, size))
    return network.eval()


def resnet18(seed: int = 0, size: int = 224, classes: int = 1000) -> nn.Module:
    """ResNet-18: 1.82 GMAC and 11.7 M parameters at 224."""
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Basic(inputs, outputs, stride), _Basic(outputs, outputs, 1)]
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return _settle(nn.Sequential(*layers), seed, size)


def mobilenet_v2(seed: int = 0, size: int = 224, classes: int = 1000) -> nn.Module:
    """MobileNetV2 1.0: 0.30 GMAC and 3.5 M parameters at 224."""
    layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for factor, outputs, count, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for number in range(count):
            layers.append(_Inverted(inputs, outputs, stride if number == 0 else 1, factor))
            inputs = outputs
    layers += [*_conv(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return _settle(nn.Sequential(*layers), seed, size)
