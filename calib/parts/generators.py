"""Conditional generators: one network that makes an image of a class from a latent, trained with fresh latents at every step.

The family of GDFQ (Xu et al., ECCV 2020, arXiv 2003.03603), whose generator AIT, AdaSG, AdaDFQ, Qimera and TexQ took over. Unlike Genie's generator
(:class:`~zsq_deploy.calib.parts.parametrisations.ImageGenerator`), which is trained for one batch of latents, it can be asked for any number of images
afterwards. So a method has a stage that trains it (:class:`TrainedGenerator`) and one of no steps that draws from it (:class:`DrawnImages`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.calib.parts.labels import Targets
from zsq_deploy.calib.parts.parametrisations import Start, initialise, upsampled_conv
from zsq_deploy.calib.parts.recipe import Preparation

__all__ = ["ConditionalGenerator", "DrawnImages", "GeneratorForm", "TrainedGenerator", "keep_generator"]

_SEED = 16  # most pixels of the seed map when the number of upsamplings is left open


@dataclass(frozen=True)
class GeneratorForm:
    """The shape of a conditional generator.

    Attributes:
        latent: Size of a latent; 100 in GDFQ.
        conditioning: ``product``: an embedding of the class is multiplied with the latent (GDFQ on CIFAR); ``norms``: each batch norm has a gain and a
            shift of its own for every class (GDFQ on ImageNet).
        wide: Channels of the seed map and of the first convolution.
        narrow: Outputs of the second convolution; each further one has half as many.
        upsamplings: 2 in the paper; 0: as many as leave a seed map of at most 16 pixels, and at least 2.
        eps: Epsilon of the batch norms between convolutions. 0.8 is what the released code says, whose authors may have meant the
            momentum; images depend on it, so it is kept.
    """

    latent: int = 100
    conditioning: Literal["product", "norms"] = "product"
    wide: int = 128
    narrow: int = 64
    upsamplings: int = 2
    eps: float = 0.8

    def __post_init__(self) -> None:
        if min(self.latent, self.wide, self.narrow) < 1 or self.upsamplings < 0 or self.eps <= 0:
            raise ValueError(f"a generator of this form cannot be built: {asdict(self)}")


class ConditionalGenerator(nn.Module):
    """Images of wanted classes from latents.

    Linear to `wide` channels at 1/2^upsamplings of the size, batch norm, then upsamplings times (nearest x2, 3x3 convolution, batch norm, LeakyReLU 0.2),
    a 3x3 convolution to the image's channels, tanh, and a batch norm without parameters that standardises the images. Batch norms always use the
    statistics of the batch at hand. A size that is no multiple of 2^upsamplings is rounded up and cut.

    Args:
        channels: Of the images.
        height: Of the images.
        width: Of the images.
        classes: How many there are.
        generator: Source of the initial weights.
        form: Its shape.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        classes: int,
        generator: torch.Generator,
        form: GeneratorForm | None = None,
    ) -> None:
        super().__init__()
        self.form = form = form or GeneratorForm()
        upsamplings = form.upsamplings or max(2, math.ceil(math.log2(max(height, width) / _SEED)))
        factor = 2**upsamplings
        self.size = (height, width)
        self.seed_shape = (form.wide, math.ceil(height / factor), math.ceil(width / factor))
        inner = [form.wide, *(max(8, form.narrow >> number) for number in range(upsamplings - 1))]
        widths = [form.wide, *inner]
        by_class = form.conditioning == "norms"
        self.linear = nn.Linear(form.latent, math.prod(self.seed_shape), device="meta")
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, device="meta") for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(inner[-1], channels, 3, padding=1, device="meta")
        rows = classes if by_class else 1
        self.gains = nn.ParameterList(nn.Parameter(torch.empty(rows, width, device="meta")) for width in widths)
        self.shifts = nn.ParameterList(nn.Parameter(torch.empty(rows, width, device="meta")) for width in widths)
        self.embedding = None if by_class else nn.Parameter(torch.empty(classes, form.latent, device="meta"))
        self.to_empty(device="cpu")
        initialise(self, generator)
        with torch.no_grad():
            for gain, shift in zip(self.gains, self.shifts, strict=True):
                gain.fill_(1)
                shift.fill_(0)
            if self.embedding is not None:
                self.embedding.normal_(generator=generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _norm(self, x: Tensor, number: int, classes: Tensor, eps: float) -> Tensor:
        gain, shift = self.gains[number], self.shifts[number]
        if len(gain) == 1:
            return F.batch_norm(x, None, None, gain[0], shift[0], training=True, eps=eps)
        x = F.batch_norm(x, None, None, training=True, eps=eps)
        return torch.addcmul(shift[classes][:, :, None, None], x, gain[classes][:, :, None, None])

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Images [N, C, H, W] from latents [N, latent] and classes (int64) [N]."""
        if self.embedding is not None:
            latents = latents * self.embedding[classes]
        x = self.linear(latents).view(-1, *self.seed_shape).contiguous(memory_format=torch.channels_last)
        x = self._norm(x, 0, classes, 1e-5)
        for number, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            x = upsampled_conv(x, conv.weight, conv.bias)
            x = F.leaky_relu(self._norm(x, number + 1, classes, self.form.eps), 0.2)
        x = torch.tanh(self.last(x))[:, :, : self.size[0], : self.size[1]]
        return F.batch_norm(x, None, None, training=True, eps=1e-5)


def _built(start: Start, form: GeneratorForm, generator: torch.Generator) -> ConditionalGenerator:
    assert start.labels is not None
    _, channels, height, width = start.shape
    return ConditionalGenerator(channels, height, width, start.labels.classes, generator, form).to(start.device)


class TrainedGenerator:
    """The weights of a conditional generator are the parameters; every step sees new latents and classes.

    Args:
        start: What it starts from; its batch is that of a step.
        form: The generator's shape.

    Attributes:
        targets: The classes of the step's images, uniformly drawn.
    """

    def __init__(self, start: Start, form: GeneratorForm | None = None) -> None:
        assert start.labels is not None
        self._random, self._device = start.generator, start.device
        self._count, self._classes = start.shape[0], start.labels.classes
        self.network = _built(start, form or GeneratorForm(), start.generator)
        self.renew()

    def renew(self) -> None:
        """Draw latents and classes."""
        latents = torch.randn((self._count, self.network.form.latent), generator=self._random)
        classes = torch.randint(self._classes, (self._count,), generator=self._random)
        self.latents, self.targets = latents.to(self._device), Targets(classes.to(self._device))

    def groups(self) -> Mapping[str, list[Tensor]]:
        """One group, ``generator``."""
        return {"generator": list(self.network.parameters())}

    def images(self) -> Tensor:
        """The images of the step."""
        made: Tensor = self.network(self.latents, self.targets.classes)
        return made

    def state(self) -> dict[str, Tensor]:
        """Weights, and what the next latents come from."""
        weights = {f"generator.{name}": value.detach() for name, value in self.network.named_parameters()}
        return {"random": self._random.get_state(), **weights}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        self._random.set_state(state["random"].cpu())
        for name, value in self.network.named_parameters():
            value.copy_(state[f"generator.{name}"])


def keep_generator(preparation: Preparation) -> dict[str, Tensor]:
    """For `Recipe.prepare` of a stage that draws: the weights that the stage before trained."""
    prefix = "parameters."
    found = preparation.previous[0]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(f"{prefix}generator.")}


class DrawnImages:
    """Images from a trained generator; nothing is optimised any more.

    Args:
        start: What it starts from, with the weights prepared by :func:`keep_generator`.
        form: The generator's shape.

    Attributes:
        targets: Every class as often as any other over the whole set, in order.
    """

    def __init__(self, start: Start, form: GeneratorForm | None = None) -> None:
        assert start.labels is not None
        self.network = _built(start, form or GeneratorForm(), torch.Generator())
        with torch.no_grad():
            for name, value in self.network.named_parameters():
                value.copy_(start.prepared[f"generator.{name}"])
        count = start.shape[0]
        latents = torch.randn((count, self.network.form.latent), generator=start.generator)
        classes = (torch.arange(count) + start.offset) % start.labels.classes
        self.latents, self.targets = latents.to(start.device), Targets(classes.to(start.device))

    def groups(self) -> Mapping[str, list[Tensor]]:
        """Nothing to optimise."""
        return {}

    @torch.no_grad()
    def images(self) -> Tensor:
        """The images."""
        made: Tensor = self.network(self.latents, self.targets.classes)
        return made

    def state(self) -> dict[str, Tensor]:
        """The latents."""
        return {"latents": self.latents}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.latents = state["latents"].to(self.latents)
