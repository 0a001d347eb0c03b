"""Image-steps per second of synthesis against the plain formulation of the same loss, side by side in one process.

Plain is what one writes down from the paper: the torch module in evaluation mode, hooks on the inputs of its batch norms, `torch.var`,
float32, plain (NCHW) layout, parameters without gradients, `torch.optim.Adam`. Both sides work on the same start images; before anything is timed
their losses and gradients are compared. Rounds alternate, so that whatever else runs on the machine hits both; the ratio
is the median over rounds of paired times.

    python tools/bench_synthesis.py --path models --module cifar_resnet:resnet20 --weights models/resnet20_cifar10.safetensors
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _plain_losses import LOSSES, Given, augmented
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.augment import Plan
from zsq_deploy.calib.parts.bn_loss import SLACK
from zsq_deploy.calib.parts.engine import BatchRun, Objective, deterministic
from zsq_deploy.calib.parts.labels import Targets, find_labels
from zsq_deploy.calib.parts.memory import steady_memory
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import LatentImages, Pixels
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Finished, Preparation, Recipe
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.sizing import largest_batch
from zsq_deploy.calib.parts.terms import Context
from zsq_deploy.model import Preprocess, load_model


class Plain:
    """The method as one would write it down: hooks, `torch.var`, NCHW, Adam."""

    def __init__(
        self, method: str, module: nn.Module, shape: tuple[int, ...], recipe: Recipe, given: Mapping[str, Any]
    ) -> None:
        self.method, self.module, self.recipe, self.shape, self.given = method, module, recipe, shape, dict(given)
        self.norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        self.seen: list[Tensor] = []
        self.features: list[Tensor] = []
        for norm in self.norms:
            norm.register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))
        last = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1]
        last.register_forward_pre_hook(lambda _, given: self.features.append(given[0].flatten(1)))
        start, self.random = batch_generator(0, "images", 0), batch_generator(0, "augment", 0)
        if method == "genie":
            self.latent = LatentImages(shape, start)
            self.latent.network.to(memory_format=torch.contiguous_format)
            self.latent.network.forward = self.generate  # type: ignore[method-assign]
            self.optimisers = [
                torch.optim.Adam([self.latent.latents], lr=0.1),
                torch.optim.Adam(self.latent.network.parameters(), lr=0.01),
            ]
            return
        group = recipe.groups["images"]
        self.pixels = torch.randn(shape, generator=start).requires_grad_()
        self.optimisers = [torch.optim.Adam([self.pixels], lr=group.rate, betas=group.betas)]

    def images(self) -> Tensor:
        """The batch, with gradients."""
        return self.latent.images().contiguous() if self.method == "genie" else self.pixels

    def generate(self, latents: Tensor) -> Tensor:
        """The generator as it is published: enlarge, then convolve."""
        parts = self.latent.network
        x = parts.first_norm(parts.linear(latents).view(-1, *parts.seed_shape))
        for index, conv in enumerate(parts.convs):
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
            if index < len(parts.norms):
                x = F.leaky_relu(parts.norms[index](x), 0.2)
        return F.batch_norm(torch.tanh(x)[:, :, : parts.size[0], : parts.size[1]], None, None, training=True)

    def loss(self, images: Tensor, plans: Sequence[Plan] | None = None) -> Tensor:
        """The paper's loss; without `plans` the choices of the step are drawn."""
        self.seen.clear()
        self.features.clear()
        if plans is None:
            plans = [augment.draw(self.shape, self.random, 0, 1) for augment in self.recipe.augment]
        seen = augmented(images, plans)
        scores = self.module(seen).flatten(1)
        given = Given(self.norms, self.seen, images, seen, scores, self.features[-1], **self.given)
        return LOSSES[self.method](given)

    def step(self) -> None:
        """One step of Adam."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        self.loss(self.images()).backward()
        for optimiser in self.optimisers:
            optimiser.step()


def main() -> None:
    """Compare, then race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="folder that the module is imported from")
    parser.add_argument("--module", default="cifar_resnet:resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225])
    parser.add_argument("--method", choices=list(LOSSES), default="zeroq")
    parser.add_argument("--batch", type=int, default=0, help="0: the method's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from safetensors.torch import load_file

    sys.path.insert(0, str(options.path))
    name, maker = options.module.split(":")
    module = getattr(__import__(name), maker)()
    module.load_state_dict(load_file(options.weights))
    module.eval().requires_grad_(requires_grad=False)
    model = load_model(
        options.module,
        path=options.path,
        weights=options.weights,
        input_shape=(1, *options.shape),
        preprocess=Preprocess(tuple(options.mean), tuple(options.std)),
    )

    chosen = METHODS[options.method]
    assert chosen.run is not None
    parameters = {**chosen.defaults, "clip": False, **({"swing": 0} if options.method == "genie" else {})}
    recipe = chosen.run(parameters)
    assert isinstance(recipe, Recipe)
    batch = options.batch or recipe.batch_size
    shape = (batch, *options.shape)
    spec, device = model.inputs[0], torch.device("cpu")
    identity = InputSpace(None, None, None, None, None, None)
    labels = find_labels(model.graph, model.outputs)
    context = Context(model, prepare(model), spec, identity, labels, device, torch.float32)
    if recipe.prepare is not None:
        context = replace(context, prepared=recipe.prepare(Preparation(context, batch, batch)))
    ours = Objective(recipe, context.network, spec, identity, device=device, context=context)
    ours.piece = largest_batch(ours, tuple(options.shape), batch, device, None)[1]
    memory: dict[str, Tensor] = {}
    if recipe.remember is not None:  # as if a batch had been made before
        noise = torch.randn(shape, generator=batch_generator(2, "images", 0))
        targets = Targets(torch.arange(batch) % (labels.classes if labels else 1))
        before = Finished(noise, targets, {}, lambda names: ours.values(noise, names), context)
        memory = dict(recipe.remember(before))
    run = BatchRun(ours, shape, 0, 0, memory=memory)
    scene = replace(ours.rehearsal(shape), memory=memory, targets=run.targets)
    given = {
        "classes": run.targets.classes if run.targets else None,
        "soft": run.targets.soft if run.targets else None,
        "memory": memory,
        "slack": context.prepared.get(SLACK),
        "options": parameters,
    }
    plain = Plain(options.method, module, shape, recipe, given)

    images = Pixels(shape, batch_generator(1, "images", 0)).pixels
    theirs = images.detach().contiguous().requires_grad_()
    expected = plain.loss(theirs, scene.plans)
    expected.backward()
    value = ours.backward(images, scene)["loss"]
    assert images.grad is not None
    assert theirs.grad is not None
    error = abs(value - expected.item()) / abs(expected.item())
    gradient_error = float((images.grad - theirs.grad).norm() / theirs.grad.norm())
    if error > 1e-4 or gradient_error > 2e-2:  # rectifiers flip where rounding decides, on either side
        raise SystemExit(f"not the same loss: value differs by {error:.2e}, gradient by {gradient_error:.2e}")

    def timed(step: object) -> float:
        start = time.perf_counter()
        step()  # type: ignore[operator]
        return time.perf_counter() - start

    def fast() -> float:
        with steady_memory(), deterministic():
            run.advance()  # the first step after a pause pays for memory that plain returned
            return timed(run.advance)

    def slow() -> float:
        plain.step()
        return timed(plain.step)

    pairs = [(slow(), fast()) for _ in range(options.rounds + 1)][1:]
    result = {
        "method": options.method,
        "network": options.module,
        "batch": batch,
        "piece": ours.piece,
        "threads": options.threads,
        "native_loops": native.kernels() is not None,
        "loss_relative_error": error,
        "gradient_relative_error": gradient_error,
        "plain_image_steps_per_second": batch / statistics.median(a for a, _ in pairs),
        "image_steps_per_second": batch / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratio_quartiles": statistics.quantiles([a / b for a, b in pairs], n=4)[::2],
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for key, item in result.items():
        print(f"{key:32} {item:.4g}" if isinstance(item, float) else f"{key:32} {item}")


if __name__ == "__main__":
    main()
