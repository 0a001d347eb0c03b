"""What is optimised so that images come out of it: the pixels themselves, or latents and a generator.

Both start from an explicit random generator and give images in standard space (see :mod:`.priors`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zsq_deploy.calib.parts.labels import LabelSpace, Targets

__all__ = [
    "Finishing",
    "ImageGenerator",
    "LatentImages",
    "Parametrisation",
    "Pixels",
    "Renewing",
    "Start",
    "initialise",
    "pixels",
    "upsampled_conv",
]

_SEED = 16  # pixels of the seed map when the number of upsamplings is left open


class Parametrisation(Protocol):
    """Something with parameters in named groups that makes a batch of images."""

    def groups(self) -> Mapping[str, list[Tensor]]:
        """Leaf tensors to optimise, by group name (each group has its own step size and schedule)."""

    def images(self) -> Tensor:
        """The batch in standard space, with gradients."""

    def state(self) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs to go on exactly here."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""


@runtime_checkable
class Renewing(Protocol):
    """A parametrisation that draws something anew for every step, such as the latents that a generator is trained with."""

    def renew(self) -> None:
        """Draw it; called in front of each step."""


@runtime_checkable
class Finishing(Protocol):
    """A parametrisation whose finished images are not what a step looks at."""

    def finished(self) -> Tensor:
        """The images to hand over, in standard space."""


@dataclass(frozen=True)
class Start:
    """What the parameters of a batch start from.

    Attributes:
        shape: Of the images [N, C, ...].
        generator: Source of everything random, on the CPU.
        device: Where they live.
        targets: What the images are asked to be.
        labels: The network's classes.
        prepared: What the recipe's `prepare` left.
        previous: For a later stage: ``images`` [N, C, ...] in the network's input space and ``parameters.*`` of the same batch in the stage
            before; empty where that stage made other batches.
        offset: Images in the batches before this one.
    """

    shape: tuple[int, ...]
    generator: torch.Generator
    device: torch.device
    targets: Targets | None = None
    labels: LabelSpace | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    previous: Mapping[str, Tensor] = field(default_factory=dict)
    offset: int = 0


class Pixels:
    """The pixels are the parameters; they start as N(0, 1) noise.

    Args:
        shape: [N, C, ...].
        generator: Source of the noise.
        device: Where they live.
    """

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        noise = torch.randn(shape, generator=generator).to(device)
        if noise.dim() == 4:
            noise = noise.to(memory_format=torch.channels_last)
        self.pixels = noise.requires_grad_()

    def groups(self) -> Mapping[str, list[Tensor]]:
        """One group, ``images``."""
        return {"images": [self.pixels]}

    def images(self) -> Tensor:
        """The pixels."""
        return self.pixels

    def state(self) -> dict[str, Tensor]:
        """The pixels."""
        return {"pixels": self.pixels.detach()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        self.pixels.copy_(state["pixels"])


def pixels(start: Start) -> Pixels:
    """Pixels that start as noise, for a recipe."""
    return Pixels(start.shape, start.generator, start.device)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(interpolate(x, 2, "nearest"), weight, bias, padding=1)`` for a 3x3 kernel, at four ninths of the work.

    Two neighbouring pixels of an enlarged picture are often the same pixel of the small one, so each of the four output phases
    is a 2x2 convolution of the small picture whose taps are sums of the original ones. The four are computed as one convolution with
    four times the channels, and interleaved.
    """
    taps = _TAPS.to(weight)
    small = torch.einsum("apt,bqu,octu->abocpq", taps, taps, weight).reshape(-1, *weight.shape[1:2], 2, 2)
    phases = F.conv2d(x, small, None if bias is None else bias.repeat(4), padding=1)
    result: Tensor = _Interleave.apply(phases)  # type: ignore[no-untyped-call]
    return result


# Row of the small picture that each tap of the 3-tap kernel falls on: [phase, row, tap].
_TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])


class _Interleave(torch.autograd.Function):
    """[N, (2, 2, C), H + 1, W + 1] windows of four phases to [N, C, 2H, 2W] in channels-last memory, and back."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        count, channels, height, width = phases.shape
        ctx.shape = (count, height, width, channels)
        height, width, channels = height - 1, width - 1, channels // 4
        source = phases.permute(0, 2, 3, 1).reshape(count, height + 1, width + 1, 2, 2, channels)
        out = phases.new_empty((count, height, 2, width, 2, channels))
        for a in range(2):
            for b in range(2):
                out[:, :, a, :, b] = source[:, a : a + height, b : b + width, a, b]
        return out.view(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        count, height, width, channels = ctx.shape
        back = gradient.new_empty(ctx.shape)
        target = back.view(count, height, width, 2, 2, channels // 4)
        height, width = height - 1, width - 1
        source = gradient.permute(0, 2, 3, 1).reshape(count, height, 2, width, 2, channels // 4)
        for a in range(2):
            for b in range(2):
                target[:, a : a + height, b : b + width, a, b] = source[:, :, a, :, b]
                target[:, height if a == 0 else 0, :, a, b] = 0  # windows that this phase does not use
                target[:, :, width if b == 0 else 0, a, b] = 0
        return back.permute(0, 3, 1, 2)


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Initial weights as torch gives such layers (fan-in uniform, batch norms the identity), from an explicit source."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.fill_(1)
            module.bias.fill_(0)


class ImageGenerator(nn.Module):
    """Genie's generator (arXiv 2212.04780): a small upsampling network without labels.

    Linear to `wide` channels at 1/2^`upsamplings` of the size, batch norm, then `upsamplings` times (nearest x2, 3x3 convolution, and
    between two of them batch norm and LeakyReLU 0.2), tanh, and a batch norm without parameters that standardises the images.
    Batch norms always use the statistics of the batch at hand. A size that is no multiple of 2^`upsamplings` is rounded up and
    cut. The first convolution has `narrow` outputs, each further one half as many.

    Args:
        channels: Of the images.
        height: Of the images.
        width: Of the images.
        generator: Source of the initial weights (fan-in uniform, as torch initialises such layers).
        latent: Size of a latent; 256 in the paper's code.
        wide: Channels of the seed map; 128.
        narrow: Outputs of the first convolution; 64.
        upsamplings: 2 in the paper's code; 0: as many as leave a seed map of at most 16 pixels, and at least 2. On a CPU the
            published 56 x 56 seed for pictures of 224 x 224 costs many times what the network itself does.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        generator: torch.Generator,
        *,
        latent: int = 256,
        wide: int = 128,
        narrow: int = 64,
        upsamplings: int = 2,
    ) -> None:
        super().__init__()
        upsamplings = upsamplings or max(2, math.ceil(math.log2(max(height, width) / _SEED)))
        factor = 2**upsamplings
        self.size = (height, width)
        self.seed_shape = (wide, math.ceil(height / factor), math.ceil(width / factor))
        self.linear = nn.Linear(latent, math.prod(self.seed_shape), device="meta")
        self.first_norm = nn.BatchNorm2d(wide, track_running_stats=False, device="meta")
        inner = [max(8, narrow >> number) for number in range(upsamplings - 1)]
        widths = [wide, *inner, channels]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, device="meta") for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b, track_running_stats=False, device="meta") for b in inner)
        self.to_empty(device="cpu")
        initialise(self, generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] from latents [N, latent]."""
        x = self.linear(latents).view(-1, *self.seed_shape).contiguous(memory_format=torch.channels_last)
        x = self.first_norm(x)
        for index, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            x = upsampled_conv(x, conv.weight, conv.bias)
            if index < len(self.norms):
                x = F.leaky_relu(self.norms[index](x), 0.2)
        x = torch.tanh(x)[:, :, : self.size[0], : self.size[1]]
        return F.batch_norm(x, None, None, training=True, eps=1e-5)


class LatentImages:
    """Latents and a fresh generator, trained together (Genie).

    Args:
        shape: [N, C, H, W].
        generator: Source of latents and weights.
        device: Where they live.
        latent: Size of a latent.
        upsamplings: See :class:`ImageGenerator`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        *,
        latent: int = 256,
        upsamplings: int = 2,
    ) -> None:
        count, channels, height, width = shape
        self.latents = torch.randn((count, latent), generator=generator).to(device).requires_grad_()
        self.network = ImageGenerator(channels, height, width, generator, latent=latent, upsamplings=upsamplings).to(
            device
        )

    def groups(self) -> Mapping[str, list[Tensor]]:
        """``latents`` and ``generator``."""
        return {"latents": [self.latents], "generator": list(self.network.parameters())}

    def images(self) -> Tensor:
        """The images that the generator makes of the latents."""
        made: Tensor = self.network(self.latents)
        return made

    def state(self) -> dict[str, Tensor]:
        """Latents and weights."""
        weights = {f"generator.{name}": value.detach() for name, value in self.network.named_parameters()}
        return {"latents": self.latents.detach(), **weights}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        self.latents.copy_(state["latents"])
        for name, value in self.network.named_parameters():
            value.copy_(state[f"generator.{name}"])
