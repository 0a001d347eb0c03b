"""Terms that look at the images alone: smoothness, size, and how alike the images of a batch are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.augment import blurred
from zsq_deploy.calib.parts.priors import total_variation
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["GramSpectrum", "LikeBlurred", "PixelNorm", "TotalVariation"]


@dataclass(frozen=True)
class TotalVariation:
    """Total variation of the batch (DeepInversion, arXiv 1912.08795, equation 3; see :func:`~zsq_deploy.calib.parts.priors.total_variation`).

    Attributes:
        weight: Its weight.
        norm: ``l2``: four plain norms over the whole batch; ``l1``: four mean absolute differences.
        seen: Of what the network was given (after augmentation) instead of the images.
    """

    weight: float = 1.0
    norm: Literal["l1", "l2"] = "l2"
    seen: bool = True
    name: str = "smooth"
    separable: bool = False
    needs_labels: bool = False

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs no network."""
        del context
        return self

    def __call__(self, look: Look) -> Tensor:
        """The total variation."""
        return total_variation(look.seen if self.seen else look.images, self.norm)


@dataclass(frozen=True)
class PixelNorm:
    """The size of what the network was given: plain norms (DeepInversion), or the mean square.

    Attributes:
        weight: Its weight.
        of: ``batch``: one plain norm over the whole batch (DeepInversion's CIFAR code); ``image``: the mean over images of each one's plain norm
            (its ImageNet code, DSG's); ``square``: the mean over images of the sum of squares. The last two are separable.
    """

    weight: float = 1.0
    of: Literal["batch", "image", "square"] = "batch"
    name: str = "size"
    needs_labels: bool = False

    @property
    def separable(self) -> bool:
        """Means over images are sums over images."""
        return self.of != "batch"

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs no network."""
        del context
        return self

    def __call__(self, look: Look) -> Tensor:
        """The norm."""
        if self.of == "square":
            return look.seen.square().sum() / look.batch
        if self.of == "image":
            each: Tensor = torch.linalg.vector_norm(look.seen.flatten(1), dim=1)
            return each.sum() / look.batch
        norm: Tensor = torch.linalg.vector_norm(look.seen)
        return norm


@dataclass(frozen=True)
class LikeBlurred:
    """Mean squared difference between the images and a copy of them that is blurred with a Gaussian (KW, arXiv 1912.01274, section 3.2).

    Attributes:
        weight: Its weight.
        sigma: Of the Gaussian, in pixels.
    """

    weight: float = 1.0
    sigma: float = 1.0
    name: str = "smooth"
    separable: bool = True
    needs_labels: bool = False

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs no network; inputs that are no images have no neighbours, and the term is nothing."""
        del context
        return self

    def __call__(self, look: Look) -> Tensor:
        """The mean over pixels, channels and images."""
        images = look.images
        if images.dim() != 4:
            return images.new_zeros(())
        return (images - blurred(images, self.sigma)).square().sum() / (look.batch * images[0].numel())


@dataclass(frozen=True)
class GramSpectrum:
    """How far the correlations between the images of a batch are from those of noise (DSG, TPAMI version, arXiv 2109.00212).

    The images are scaled to length 1; their inner products form a matrix whose eigenvalues tell how alike they are: all 1 for
    unrelated images, one of N for N equal ones. The loss is the mean squared difference to the sorted eigenvalues of noise.
    The noise is drawn once a run and the mean over four draws taken.

    Attributes:
        weight: Its weight.
    """

    weight: float = 1.0
    name: str = "variety"
    separable: bool = False
    needs_labels: bool = False

    def bind(self, context: Context) -> BoundTerm:
        """The term with noise of its own."""
        return _BoundSpectrum(context.seed)


@dataclass
class _BoundSpectrum:
    """A spectrum term with the eigenvalues of noise, by shape of the batch."""

    seed: int
    fetch: Sequence[str] = ()
    noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __call__(self, look: Look) -> Tensor:
        """The mean over eigenvalues."""
        shape = tuple(look.images.shape)
        if shape not in self.noise:
            random = batch_generator(self.seed, "spectrum", 0)
            drawn = [_spectrum(torch.randn(shape, generator=random)) for _ in range(_DRAWS)]
            self.noise[shape] = torch.stack(drawn).mean(0).to(look.images)
        return (_spectrum(look.images) - self.noise[shape]).square().mean()


_DRAWS = 4


def _spectrum(images: Tensor) -> Tensor:
    """Eigenvalues, in rising order, of the inner products of images scaled to length 1."""
    rows = F.normalize(images.flatten(1), dim=1)
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.T)
    return values
