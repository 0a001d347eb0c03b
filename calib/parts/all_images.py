"""Statistics over all images while only a piece of them is in memory (Sony's data generation, WACV 2025).

A loss on the statistics of a large batch needs all of its images at once for its gradient: too much memory. But mean and variance of a whole are
sums over its pieces, and the gradient in the images of one piece only needs the other pieces' moments, which are a few numbers a channel. So
each piece runs through the network alone, its own moments carry the gradient, and those of the others come from a table of what they were
when they were last seen. Within a step no image moves, so the pieces behind the first see the moments of those before them as they are, and those of the ones
after them as they were one step ago; with one piece this is the whole batch exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import Observed

__all__ = ["MomentTable"]


class MomentTable:
    """Mean and (biased) variance of every watched channel, for each piece of a batch.

    Args:
        sizes: Images in each piece.
        device: Where they are kept.
        dtype: In what precision.
    """

    def __init__(self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._sizes, self._total = sizes, sum(sizes)
        self._share = torch.tensor(sizes, dtype=dtype, device=device) / sum(sizes)
        self._mean: Tensor | None = None
        self._var: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether every piece was seen."""
        return self._mean is not None and not bool(torch.isnan(self._mean[:, 0]).any())

    @torch.no_grad()
    def keep(self, piece: int, observed: Mapping[str, Observed]) -> None:
        """Remember the moments of a piece."""
        mean = torch.cat([observed[name].mean.detach() for name in observed])
        var = torch.cat([observed[name].var.detach() for name in observed])
        if self._mean is None or self._var is None:
            empty = mean.new_full((len(self._share), len(mean)), torch.nan)
            self._mean, self._var = empty, empty.clone()
        self._mean[piece], self._var[piece] = mean, var

    def whole(self, piece: int, observed: Mapping[str, Observed]) -> dict[str, Observed]:
        """The moments of all images: of `piece` as observed, with gradients, of the others as remembered.

        From shares w, means m and variances v of the pieces: M = sum w m, V = sum w (v + (m - M)^2), taken as the live piece and the rest.
        """
        if self._mean is None or self._var is None:
            raise ValueError("no piece has been seen yet")
        names = list(observed)
        mean = torch.cat([observed[name].mean for name in names])
        var = torch.cat([observed[name].var for name in names])
        own = self._sizes[piece] / self._total
        rest = 1 - own
        if len(self._sizes) == 1:
            return dict(observed)
        others = [number for number in range(len(self._sizes)) if number != piece]
        weight = (self._share[others] / rest)[:, None]
        rest_mean = (weight * self._mean[others]).sum(0)
        rest_var = (weight * (self._var[others] + (self._mean[others] - rest_mean).square())).sum(0)
        total_mean = own * mean + rest * rest_mean
        total_var = own * var + rest * rest_var + own * rest * (mean - rest_mean).square()
        sizes = [observed[name].mean.shape[0] for name in names]
        parts = zip(names, torch.split(total_mean, sizes), torch.split(total_var, sizes), strict=True)
        return {name: Observed(a, b) for name, a, b in parts}

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs."""
        return {} if self._mean is None or self._var is None else {"mean": self._mean, "var": self._var}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        if state:
            self._mean, self._var = (state[name].to(self._share).clone() for name in ("mean", "var"))
