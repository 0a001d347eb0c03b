"""One loss for all papers that match batch-normalization statistics.

Twenty of the surveyed methods pull the statistics of synthetic images at each batch-norm layer towards the stored ones. They differ in
what looks like detail and changes the loss by orders of magnitude: statistics per image or per batch, variance or standard
deviation, biased or not, squared or plain norm, what the sum is divided by, and how the layers are weighted. :class:`BNLoss`
names those choices; :class:`BNMatcher` binds them to the layers of one network and a device.

The forms that papers use (letters as in the block matrix of the project's notes):

====  =========================================================================================================
B1a   ``BNLoss(hook="conv_out", per_sample=True, moment="std", unbiased=True, norm="l2sq", divide_by="channels",
      eps=1e-6, input_prior=True)`` (ZeroQ), DSG's hinge form see B1f
B1b   ``BNLoss(moment="var", norm="mse", reduce="mean")`` (GDFQ and its descendants)
B1c   ``BNLoss(moment="var", norm="l2", layer_weight="first_x10")`` (DeepInversion)
B1d   ``BNLoss(moment="std", unbiased=True, norm="l2sq", divide_by="channels", eps=1e-6, input_prior=True)`` (Genie)
B1e   ``BNLoss(norm="kl", reduce="mean")`` (The Knowledge Within)
B1f   B1a with ``norm="hinge", divide_by="batch", slack_quantile=0.9, emphasis=True`` (DSG)
B1g   B1b with ``layer_weight="shallow_0.2_deep_1.1"`` (TexQ, SynQ)
====  =========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsq_deploy.calib.parts.moments import count_of, watch

__all__ = ["LAYER_WEIGHTS", "SLACK", "BNLayer", "BNLoss", "BNMatcher", "Losses", "Observed"]

Float64 = npt.NDArray[np.float64]

#: Name under which a recipe's `prepare` leaves the slack of a ``hinge`` loss: [layers, 2], see :attr:`BNMatcher.slack`.
SLACK = "slack"

#: Weight of layer `index` among `total`, by name.
LAYER_WEIGHTS: Mapping[str, Callable[[int, int], float]] = {
    "one": lambda _index, _total: 1.0,
    "first_x10": lambda index, _total: 10.0 if index == 0 else 1.0,
    "shallow_0.2_deep_1.1": lambda index, total: 0.2 if index < total // 2 else 1.1,
    "shallow_0_deep_1": lambda index, total: 0.0 if index < total // 2 else 1.0,
}


@dataclass(frozen=True)
class BNLoss:
    """The choices that make up one paper's batch-norm-statistics loss.

    Attributes:
        hook: ``bn_in`` looks at what enters every batch norm; ``conv_out`` leaves out those with no convolution or matrix product
            directly in front (a batch norm after a concatenation or a sum). Where both exist they are the same tensor.
        per_sample: Statistics of each image alone (over height and width) instead of over the batch.
        moment: The second moment that is compared.
        unbiased: Divide the observed variance by n - 1.
        norm: Distance between observed and stored moments of one layer: ``mse`` (mean of squares), ``l2sq`` (sum of squares, see
            `divide_by`), ``l2`` (its root), ``kl`` (Kullback-Leibler divergence of the two Gaussians, mean over channels),
            ``hinge`` (``l2sq`` of what exceeds a slack).
        divide_by: What ``l2sq`` and ``hinge`` sums are divided by: nothing, the number of images, or the number of channels.
        eps: Added under both roots when standard deviations are compared; ``None``: the layer's own epsilon under the stored one
            and 1e-12 under the observed one (for ``kl``, the layer's own on both variances).
        layer_weight: Name of a rule in :data:`LAYER_WEIGHTS`.
        reduce: Sum or mean over layers.
        input_prior: Add the same distance for the network's input, against the statistics of natural images.
        input_layer: Count the network's input as one more layer, in front of the others, with the statistics of natural images.
        slack_quantile: For ``hinge``: the quantile of the gaps that noise inputs produce, per layer.
        emphasis: Image i counts layer (i mod L) twice (DSG's layerwise enhancement).
        relative: Measure gaps in units of what the layer's channels spread on average, so that a network whose input is 0..255 weighs its
            layers like one whose input is normalised. No paper does; not for ``kl``, which has no units.
    """

    hook: Literal["bn_in", "conv_out"] = "bn_in"
    per_sample: bool = False
    moment: Literal["std", "var"] = "var"
    unbiased: bool = False
    norm: Literal["mse", "l2", "l2sq", "kl", "hinge"] = "mse"
    divide_by: Literal["none", "batch", "channels"] = "none"
    eps: float | None = None
    layer_weight: str = "one"
    reduce: Literal["sum", "mean"] = "sum"
    input_prior: bool = False
    input_layer: bool = False
    slack_quantile: float = 0.9
    emphasis: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if self.layer_weight not in LAYER_WEIGHTS:
            raise ValueError(f"unknown layer weight {self.layer_weight!r}; known: {', '.join(LAYER_WEIGHTS)}")
        if self.emphasis and not self.per_sample:
            raise ValueError("emphasis needs statistics per image")
        if not 0 <= self.slack_quantile <= 1:
            raise ValueError("slack_quantile lies between 0 and 1")

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over images, so that a batch can be worked through in pieces with the same result."""
        return self.per_sample and self.norm != "l2"

    def as_parameters(self) -> dict[str, Any]:
        """All choices as plain values, for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class BNLayer:
    """A batch-norm layer and the value in the graph that enters it.

    Attributes:
        name: Node name of the batch norm.
        value: Name of the value that enters it.
        mean, var: Stored statistics [C].
        eps: The layer's epsilon.
        direct: A convolution or matrix product stands directly in front of the layer.
    """

    name: str
    value: str
    mean: Float64
    var: Float64
    eps: float
    direct: bool = True


@dataclass(frozen=True)
class Observed:
    """Moments of one value: [N, C] per image or [C] per batch."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Losses:
    """The loss and its parts; all are scalars that carry gradients."""

    total: Tensor
    mean: Tensor
    spread: Tensor
    input: Tensor

    def values(self) -> dict[str, float]:
        """Plain numbers, for a progress line."""
        return {
            "loss": float(self.total.detach()),
            "mean": float(self.mean.detach()),
            "spread": float(self.spread.detach()),
            "input": float(self.input.detach()),
        }


class _Group:
    """Layers whose statistics have the same form, side by side in one long row of channels."""

    def __init__(self, loss: BNLoss, layers: Sequence[tuple[int, BNLayer]], total: int, per_sample: bool) -> None:
        self.layers = [index for index, _ in layers]
        self.per_sample = per_sample
        self.sizes = [layer.mean.size for _, layer in layers]
        self.mean = np.concatenate([layer.mean for _, layer in layers])
        self.var = np.concatenate([layer.var for _, layer in layers])
        eps = np.repeat([layer.eps for _, layer in layers], self.sizes)
        self.eps = np.full_like(eps, loss.eps) if loss.eps is not None else eps
        rule = LAYER_WEIGHTS[loss.layer_weight]
        self.layer_weights = [rule(index, total) / (total if loss.reduce == "mean" else 1) for index, _ in layers]
        self.segment = np.repeat(np.arange(len(layers)), self.sizes)


class BNMatcher:
    """A :class:`BNLoss` bound to the layers of one network.

    Args:
        loss: The choices.
        layers: The layers, in graph order; those that the loss's hook leaves out are dropped here.
        device: Where it is computed.
        dtype: In what precision.
        affine: Values that only their batch norm reads, with its scale and shift, which the taps are to apply themselves.
        bounds: Values that only a rectifier reads, which the taps are to apply themselves (see :func:`~.moments.watch`).
        joins: Values that only a sum reads, with the value that it adds, which the taps are to add themselves.
        owned: Values whose gradient may be changed in place.

    Attributes:
        layers: The layers that count.
    """

    def __init__(
        self,
        loss: BNLoss,
        layers: Sequence[BNLayer],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        affine: Mapping[str, tuple[Float64, Float64]] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        joins: Mapping[str, str] | None = None,
        owned: frozenset[str] = frozenset(),
    ) -> None:
        self.loss = loss
        self.layers = tuple(layer for layer in layers if loss.hook == "bn_in" or layer.direct)
        if not self.layers:
            raise ValueError("the network has no batch-norm layer that this loss could match")
        self._device, self._dtype = torch.device(device), dtype
        self._bounds, self._owned = dict(bounds or {}), owned
        self._joins, self._addends = dict(joins or {}), frozenset((joins or {}).values())
        self._slack: Tensor | None = None
        self._groups: dict[tuple[bool, ...], list[tuple[_Group, dict[str, Tensor]]]] = {}
        self._values = tuple(dict.fromkeys(layer.value for layer in self.layers))
        self._affine = {
            value: (self._tensor(scale), self._tensor(shift)) for value, (scale, shift) in (affine or {}).items()
        }

    def _tensor(self, array: npt.ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(array), dtype=self._dtype, device=self._device)

    @property
    def values(self) -> tuple[str, ...]:
        """The values that are looked at, each once."""
        return self._values

    def taps(
        self, store: dict[str, Observed], watching: Callable[..., tuple[Tensor, Tensor, Tensor]] = watch
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions for a twin's ``run(taps=...)`` that measure each value into `store`, by `watching` it, and pass it on."""
        held: dict[str, Tensor] = {}

        def tap(name: str) -> Callable[[Tensor], Tensor]:
            affine, bounds, own = self._affine.get(name), self._bounds.get(name), name in self._owned
            other, wanted = self._joins.get(name), name in self._addends

            def measure(y: Tensor) -> Tensor:
                # One number per image and channel has no spread: such a layer is matched over the batch.
                per_sample = self.loss.per_sample and count_of(y.shape, True) > 1
                y = y.to(self._dtype)  # of a convolution in mixed precision
                passed, mean, var = watching(
                    y,
                    per_sample=per_sample,
                    unbiased=self.loss.unbiased,
                    affine=affine,
                    bounds=bounds,
                    addend=None if other is None else held[other],
                    own_gradient=own,
                )
                store[name] = Observed(mean, var)
                if wanted:
                    held[name] = passed
                return passed

            return measure

        def hold(name: str) -> Callable[[Tensor], Tensor]:
            def keep(x: Tensor) -> Tensor:
                held[name] = x
                return x

            return keep

        made = {name: hold(name) for name in self._addends}
        made.update({name: tap(name) for name in self._values})
        return made

    def set_slack(self, noise: Sequence[Mapping[str, Observed]]) -> None:
        """For ``hinge``: take the slack of each layer from what noise inputs produce."""
        gaps: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        for observed in noise:
            for group, tensors in self._bound(observed):
                mean, second = self._gaps(group, tensors, observed)
                parts = zip(torch.split(mean, group.sizes, -1), torch.split(second, group.sizes, -1), strict=True)
                for index, (a, b) in zip(group.layers, parts, strict=True):
                    gaps[index].append((a.abs().flatten(), b.abs().flatten()))
        quantile = self.loss.slack_quantile
        rows = [
            [torch.quantile(torch.cat(list(side)), quantile) for side in zip(*pairs, strict=True)] for pairs in gaps
        ]
        self._slack = torch.stack([torch.stack(row) for row in rows])

    @property
    def slack(self) -> Tensor | None:
        """For ``hinge``: what gaps of mean and of spread each layer is forgiven [layers, 2]."""
        return self._slack

    @slack.setter
    def slack(self, slack: Tensor) -> None:
        if slack.shape != (len(self.layers), 2):
            raise ValueError(
                f"slack for {len(self.layers)} layers has {len(self.layers)} rows of 2, not {list(slack.shape)}"
            )
        self._slack = slack.to(self._device, self._dtype)

    def _bound(self, observed: Mapping[str, Observed]) -> list[tuple[_Group, dict[str, Tensor]]]:
        """The layers in groups of one form of statistics, with their constants on the device."""
        forms = tuple(observed[layer.value].mean.dim() == 2 for layer in self.layers)
        if forms not in self._groups:
            made = []
            for form in dict.fromkeys(forms):
                members = [(i, layer) for i, layer in enumerate(self.layers) if forms[i] == form]
                group = _Group(self.loss, members, len(self.layers), form)
                second = np.sqrt(group.var + group.eps) if self.loss.moment == "std" else group.var
                tensors = {"mean": self._tensor(group.mean), "second": self._tensor(second)}
                # A channel that is constant in training and here is as stored: the divergence is zero with one epsilon on both.
                same = self.loss.eps is not None or self.loss.norm == "kl"
                tensors["eps"] = self._tensor(group.eps if same else np.full_like(group.eps, 1e-12))
                tensors["var"] = self._tensor(group.var + group.eps)
                if self.loss.relative:
                    level = _level(group.var, group.sizes)
                    tensors["unit mean"] = self._tensor(np.sqrt(level))
                    tensors["unit second"] = self._tensor(np.sqrt(level) if self.loss.moment == "std" else level)
                tensors["segment"] = torch.as_tensor(group.segment, device=self._device)
                made.append((group, tensors))
            self._groups[forms] = made
        return self._groups[forms]

    def _moments(self, group: _Group, observed: Mapping[str, Observed]) -> tuple[Tensor, Tensor]:
        found = [observed[self.layers[index].value] for index in group.layers]
        mean = torch.cat([item.mean for item in found], -1)
        var = torch.cat([item.var for item in found], -1)
        return mean, var

    def _gaps(
        self, group: _Group, tensors: dict[str, Tensor], observed: Mapping[str, Observed]
    ) -> tuple[Tensor, Tensor]:
        mean, var = self._moments(group, observed)
        second = (var + tensors["eps"]).sqrt() if self.loss.moment == "std" else var
        mean, second = mean - tensors["mean"], second - tensors["second"]
        return (mean / tensors["unit mean"], second / tensors["unit second"]) if self.loss.relative else (mean, second)

    def _weights(self, group: _Group, batch: int) -> Tensor:
        """Weight of each channel's distance [S]: the layer's weight, over what the layer's sum is divided by."""
        loss, per_channel = self.loss, []
        for size, weight in zip(group.sizes, group.layer_weights, strict=True):
            if loss.norm in ("mse", "kl"):
                divisor = float(size * (batch if group.per_sample else 1))
            else:
                divisor = {"none": 1, "batch": batch, "channels": size}[loss.divide_by]
                if not group.per_sample and loss.per_sample:
                    divisor = divisor / batch  # one row stands for every image of the batch
                elif not group.per_sample and loss.divide_by == "batch":
                    divisor = 1
            per_channel.append(weight / divisor)
        return self._tensor(np.repeat(per_channel, group.sizes))

    def __call__(
        self,
        observed: Mapping[str, Observed],
        *,
        batch: int,
        first: int = 0,
        inputs: Observed | None = None,
        input_layer: BNLayer | None = None,
    ) -> Losses:
        """The loss of what was observed.

        Args:
            observed: Moments by value name, as the taps stored them.
            batch: Images in the whole batch (the observed ones may be a piece of it, if the loss is separable).
            first: Index of the piece's first image in the batch.
            inputs: Moments of the network's input per image, when the loss has an input prior.
            input_layer: Mean and variance that natural images have there.
        """
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        mean_loss, spread_loss, input_loss = zero, zero, zero
        for group, tensors in self._bound(observed):
            a, b = self._group_loss(group, tensors, observed, batch, first)
            mean_loss, spread_loss = mean_loss + a, spread_loss + b
        if self.loss.input_prior and inputs is not None and input_layer is not None:
            input_loss = self._input_loss(inputs, input_layer, batch)
        return Losses(mean_loss + spread_loss + input_loss, mean_loss, spread_loss, input_loss)

    def _group_loss(
        self, group: _Group, tensors: dict[str, Tensor], observed: Mapping[str, Observed], batch: int, first: int
    ) -> tuple[Tensor, Tensor]:
        loss = self.loss
        if loss.norm == "kl":
            mean, var = self._moments(group, observed)
            var, stored = var + tensors["eps"], tensors["var"]
            a = (mean - tensors["mean"]).square() / (2 * stored)
            b = ((stored / var).log() + var / stored - 1) / 2
        else:
            a, b = self._gaps(group, tensors, observed)
            if loss.norm == "hinge":
                if self._slack is None:
                    raise ValueError("the hinge needs its slack: call set_slack with what noise inputs produce")
                slack = self._slack[group.layers][tensors["segment"]]
                a = (a.abs() - slack[:, 0]).clamp_min(0)
                b = (b.abs() - slack[:, 1]).clamp_min(0)
            a, b = a.square(), b.square()
        if loss.norm == "l2":
            weights = group.layer_weights
            pieces = list(zip(weights, torch.split(a, group.sizes, -1), torch.split(b, group.sizes, -1), strict=True))
            return (
                torch.stack([weight * _root(x.sum()) for weight, x, _ in pieces]).sum(),
                torch.stack([weight * _root(y.sum()) for weight, _, y in pieces]).sum(),
            )
        key = f"weights {batch}"
        if key not in tensors:
            tensors[key] = self._weights(group, batch)
        weight = tensors[key]
        if loss.emphasis and group.per_sample:
            sample = torch.arange(first, first + a.shape[0], device=self._device) % len(self.layers)
            layer = torch.as_tensor(group.layers, device=self._device)[tensors["segment"]]
            weight = weight * (1 + (sample[:, None] == layer[None, :]).to(weight.dtype))
        return (a * weight).sum(), (b * weight).sum()

    def _input_loss(self, inputs: Observed, layer: BNLayer, batch: int) -> Tensor:
        mean, var = self._tensor(layer.mean), self._tensor(layer.var)
        if self.loss.moment == "std" or self.loss.norm == "kl":
            eps = 1e-12 if self.loss.eps is None else self.loss.eps
            second, target = (inputs.var + eps).sqrt(), var.sqrt()
        else:
            second, target = inputs.var, var
        gap = (inputs.mean - mean).square().sum() + (second - target).square().sum()
        # Per-image methods (ZeroQ, DSG) average the input term over images, per-batch ones (Genie, SADAG) sum it.
        return gap / batch if self.loss.per_sample else gap


def _level(var: Float64, sizes: Sequence[int]) -> Float64:
    """The mean variance of each layer's channels, once for every channel."""
    pieces = np.split(var, np.cumsum(sizes)[:-1])
    return np.concatenate([np.full(piece.size, max(float(piece.mean()), 1e-12)) for piece in pieces])


def _root(total: Tensor) -> Tensor:
    """Square root with a zero gradient at zero."""
    safe = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, safe.sqrt(), torch.zeros_like(total))
