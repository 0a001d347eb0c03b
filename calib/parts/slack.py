"""How far a network's statistics are from the stored ones when it sees noise: what a hinge loss forgives (DSG)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import SLACK, BNLoss, BNMatcher, Observed
from zsq_deploy.calib.parts.recipe import Preparation
from zsq_deploy.calib.parts.seeds import batch_generator

__all__ = ["noise_slack"]

_PIECE = 8


def noise_slack(loss: BNLoss, images: int = 64) -> Callable[[Preparation], Mapping[str, Tensor]]:
    """A recipe's `prepare` that measures the slack of a ``hinge`` loss with N(0, 1) noise in standard space.

    Args:
        loss: Its quantile says which of the gaps of all images and channels of a layer is forgiven.
        images: Noise images that are looked at; rounded up to what the network takes at a time.
    """

    def prepare(preparation: Preparation) -> Mapping[str, Tensor]:
        from zsq_deploy.model import Twin

        context = preparation.context
        network, spec = context.network, context.spec
        twin = Twin(network.graph, dtype=context.dtype, device=context.device)
        matcher = BNMatcher(
            loss,
            network.layers,
            device=context.device,
            dtype=context.dtype,
            affine=network.affine,
            bounds=network.bounds,
            joins=network.joins,
        )
        random = batch_generator(context.seed, "slack", 0)
        piece = _PIECE if context.model.dynamic_batch else int(spec.shape[0] or 1)
        seen: list[dict[str, Observed]] = []
        with torch.no_grad():
            for _ in range(-(-images // piece)):
                noise = torch.randn((piece, *spec.with_batch(1)[1:]), generator=random).to(context.device)
                if noise.dim() == 4:
                    noise = noise.contiguous(memory_format=torch.channels_last)
                store: dict[str, Observed] = {}
                twin.run({spec.name: context.space.to_network(noise)}, fetch=(), taps=matcher.taps(store))
                seen.append(store)
            matcher.set_slack(seen)
        assert matcher.slack is not None
        return {SLACK: matcher.slack.cpu()}

    return prepare
