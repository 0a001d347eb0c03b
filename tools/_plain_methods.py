"""A batch of images as one writes it down from a paper: hooks, `torch.var`, plain layout, torch's optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _plain_losses import LOSSES, Answer, Given, augmented
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.calib.parts.augment import Plan
from zsq_deploy.calib.parts.engine import BatchRun
from zsq_deploy.calib.parts.generators import TrainedGenerator
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.parametrisations import LatentImages
from zsq_deploy.calib.parts.recipe import Recipe
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.student import STUDENT, last_product
from zsq_deploy.calib.parts.terms import Context
from zsq_deploy.model import Graph, Twin


class Plain:
    """The method as one would write it down, from the parameters that a run starts with.

    Args:
        method: Its name.
        module: The network.
        recipe: The stage, for its step sizes and its random choices.
        run: A run of its own, whose start is taken over.
        context: What was prepared for both.
        given: What the loss needs beside what the network gives.
    """

    def __init__(
        self,
        method: str,
        module: nn.Module,
        recipe: Recipe,
        run: BatchRun,
        context: Context,
        given: Mapping[str, Any],
    ) -> None:
        self.method, self.module, self.recipe, self.shape, self.given = method, module, recipe, run.shape, dict(given)
        self.norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        self.seen: list[Tensor] = []
        self.features: list[Tensor] = []
        for norm in self.norms:
            norm.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        last = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1]
        last.register_forward_pre_hook(lambda _, inputs: self.features.append(inputs[0].flatten(1)))
        self.random = batch_generator(0, f"{run.stage}augment", 0)
        self.targets, self.classes = run.targets, context.labels.classes if context.labels else 0
        start = run.parametrisation
        self.source = start if isinstance(start, (LatentImages, TrainedGenerator)) else None
        if self.source is not None:
            self.source.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            self.groups = self.source.groups()
        else:
            pixels = start.images().detach().clone(memory_format=torch.contiguous_format)
            self.groups = {"images": [pixels.requires_grad_()]}
        self.optimisers = []
        for name, tensors in self.groups.items():
            group = recipe.groups[name]
            kind = torch.optim.RAdam if group.optimiser == "radam" else torch.optim.Adam
            self.optimisers.append(kind(tensors, lr=group.rate, betas=group.betas))
        if method == "sadag":
            self._student(context)

    def parameters(self) -> list[Tensor]:
        """What is optimised, in the order of the run's."""
        return [tensor for group in self.groups.values() for tensor in group]

    def _student(self, context: Context) -> None:
        """SADAG's student: its graph of quantizers, node for node in eager torch."""
        import onnx

        graph = Graph(onnx.load_from_string(context.prepared[STUDENT].numpy().tobytes()))
        labels, last = find_labels(graph, graph.outputs), last_product(graph)
        assert labels is not None
        assert last is not None
        twin, name, wanted = (
            Twin(graph, dtype=context.dtype, device="cpu"),
            graph.inputs[0].name,
            (labels.value, last.input[0]),
        )

        def answer(images: Tensor, scores: Tensor) -> Answer:
            made = twin.run({name: images}, fetch=wanted)
            features = made[wanted[1]]
            features = features if features.dim() == 2 else features.mean((2, 3))
            return features, scores - made[wanted[0]].flatten(1)

        def neighbours(here: Answer) -> Answer:
            assert isinstance(self.source, LatentImages)
            f, r = here
            match = ((f * f.detach()).sum(1) * (r * r.detach()).sum(1)).sum()
            (slope,) = torch.autograd.grad(match, self.source.latents, retain_graph=True)
            images = self.decoded(self.source.latents - self.given["options"]["radius"] * F.normalize(slope, dim=1))
            return answer(images, self.module(images).flatten(1))

        self.given.update(answer=answer, neighbours=neighbours)

    def draw(self) -> list[Plan]:
        """The random choices of a step."""
        return [augment.draw(self.shape, self.random, 0, 1) for augment in self.recipe.augment]

    def images(self) -> Tensor:
        """The batch, with gradients."""
        if isinstance(self.source, TrainedGenerator):
            return self._by_class(self.source)
        return self.decoded(self.source.latents) if self.source is not None else self.groups["images"][0]

    def decoded(self, latents: Tensor) -> Tensor:
        """Genie's generator as it is published: enlarge, then convolve."""
        assert isinstance(self.source, LatentImages)
        parts = self.source.network
        x = parts.first_norm(parts.linear(latents).view(-1, *parts.seed_shape))
        for index, conv in enumerate(parts.convs):
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
            if index < len(parts.norms):
                x = F.leaky_relu(parts.norms[index](x), 0.2)
        return F.batch_norm(torch.tanh(x)[:, :, : parts.size[0], : parts.size[1]], None, None, training=True)

    def _by_class(self, source: TrainedGenerator) -> Tensor:
        """GDFQ's generator as it is published."""
        parts, classes, latents = source.network, source.targets.classes, source.latents
        eps = parts.form.eps

        def norm(x: Tensor, number: int, eps: float) -> Tensor:
            gain, shift = parts.gains[number], parts.shifts[number]
            if parts.embedding is not None:
                return F.batch_norm(x, None, None, gain[0], shift[0], training=True, eps=eps)
            x = F.batch_norm(x, None, None, training=True, eps=eps)
            return x * gain[classes][:, :, None, None] + shift[classes][:, :, None, None]

        latents = latents if parts.embedding is None else latents * parts.embedding[classes]
        x = norm(parts.linear(latents).view(-1, *parts.seed_shape), 0, 1e-5)
        for number, conv in enumerate(parts.convs):
            x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2, mode="nearest")), number + 1, eps), 0.2)
        x = torch.tanh(parts.last(x))[:, :, : parts.size[0], : parts.size[1]]
        return F.batch_norm(x, None, None, training=True)

    def loss(self, plans: Sequence[Plan]) -> Tensor:
        """The paper's loss under the choices of a step."""
        images = self.images()
        self.seen.clear()
        self.features.clear()
        seen = augmented(images, plans, self.given["options"])
        scores = self.module(seen).flatten(1)
        targets = self.source.targets if isinstance(self.source, TrainedGenerator) else self.targets
        classes = targets.classes if targets else None
        soft = targets.soft if targets else None
        for plan in plans:
            if "partner" in plan:
                assert classes is not None
                own, area = F.one_hot(classes, self.classes).float(), plan["area"].float()[:, None]
                soft = (1 - area) * own + area * own[plan["partner"]]
        found = Given(self.norms, list(self.seen), images, seen, scores, self.features[-1], classes, soft, **self.given)
        return LOSSES[self.method](found)

    def step(self) -> None:
        """One step of the optimiser."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        if isinstance(self.source, TrainedGenerator):
            self.source.renew()
        self.loss(self.draw()).backward()  # type: ignore[no-untyped-call]
        for optimiser in self.optimisers:
            optimiser.step()
