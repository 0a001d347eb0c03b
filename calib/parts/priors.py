"""What is known about images before any network is asked: pixel bounds, typical statistics, smoothness.

Synthesis works in *standard space*, where natural images have mean 0 and standard deviation 1 in every channel: papers state
their start noise, step sizes and input priors there. :class:`InputSpace` maps it to what the network wants (normalised,
0..1, or raw 0..255) and knows the bounds of valid pixels. For the usual ImageNet normalisation the map is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.model.graph import TensorSpec

__all__ = ["NATURAL_MEAN", "NATURAL_STD", "InputSpace", "total_variation"]

#: Mean and standard deviation of RGB / 255 over natural photographs, the constants that nearly every network is normalised with.
NATURAL_MEAN = (0.485, 0.456, 0.406)
NATURAL_STD = (0.229, 0.224, 0.225)


class _Preprocess(Protocol):
    def apply(self, images_u8_nhwc: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]: ...
    def bounds(self, channels: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]: ...


@dataclass(frozen=True)
class InputSpace:
    """The map from standard space to the network's input, channel by channel.

    Attributes:
        mean, std: Network input = ``mean + std * standard``; shape [1, C, 1, ...]. ``None``: the identity.
        low, high: Bounds of valid values in standard space, same shape; ``None`` where the input is not an image.
        least, most: The same bounds in the network's input space.
    """

    mean: Tensor | None
    std: Tensor | None
    low: Tensor | None
    high: Tensor | None
    least: Tensor | None
    most: Tensor | None

    @classmethod
    def of(cls, spec: TensorSpec, preprocess: _Preprocess, device: torch.device | str = "cpu") -> InputSpace:
        """The space of an input: images are 4-D with 1 or 3 channels; anything else is taken as standard already."""
        channels = spec.shape[1] if len(spec.shape) == 4 else None
        if channels not in (1, 3):
            return cls(None, None, None, None, None, None)
        low, high = (np.asarray(side, np.float64) for side in preprocess.bounds(channels))
        mean, std = np.array(NATURAL_MEAN), np.array(NATURAL_STD)
        if channels == 1:
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        # Preprocessing is affine, and the bounds are the images of 0 and 1 (in units of 255).
        to_mean, to_std = low + mean * (high - low), std * (high - low)

        def tensor(values: np.ndarray[Any, Any]) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)

        identity = bool(np.allclose(to_mean, 0, atol=1e-5) and np.allclose(to_std, 1, rtol=1e-5))
        least, most = tensor(low), tensor(high)
        if identity:
            return cls(None, None, least, most, least, most)
        standard = (tensor((low - to_mean) / to_std), tensor((high - to_mean) / to_std))
        return cls(tensor(to_mean), tensor(to_std), *standard, least, most)

    def to_network(self, standard: Tensor) -> Tensor:
        """Standard space to the network's input."""
        if self.mean is None or self.std is None:
            return standard
        return torch.addcmul(self.mean, standard, self.std)

    def bounded(self, network: Tensor) -> Tensor:
        """Network inputs within the valid bounds to the last bit."""
        if self.least is None or self.most is None:
            return network
        return torch.clamp(network, self.least, self.most)

    def clip(self, standard: Tensor) -> Tensor:
        """Values outside the valid pixels go to the nearest valid one (no gradient there)."""
        if self.low is None or self.high is None:
            return standard
        return torch.clamp(standard, self.low, self.high)

    @torch.no_grad()
    def clip_(self, standard: Tensor) -> Tensor:
        """The same in place: projected gradient descent on pixels."""
        if self.low is None or self.high is None:
            return standard
        return torch.clamp(standard, self.low, self.high, out=standard)


def total_variation(images: Tensor, norm: Literal["l1", "l2"] = "l2") -> Tensor:
    """Total variation of a batch [N, C, H, W]: differences to the neighbours below, to the right and on both diagonals.

    ``l2`` is the sum of the four plain norms over the whole batch (DeepInversion, arXiv 1912.08795, released form), ``l1`` the sum of the
    four mean absolute differences.
    """
    differences = (
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    )
    if norm == "l1":
        return torch.stack([d.abs().mean() for d in differences]).sum()
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()
