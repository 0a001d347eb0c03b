"""Image-steps per second of synthesis against the plain formulation of the same loss, side by side in one process.

Plain is what one writes down from the paper: the torch module in evaluation mode, hooks on the inputs of its batch norms, `torch.var`,
float32, plain (NCHW) layout, parameters without gradients, torch's optimisers (see _plain_losses.py, _plain_methods.py). Both sides start from the same
parameters; before anything is timed their losses and gradients are compared. Rounds alternate, so that whatever else runs on the machine hits both.

With one thread the clock is the processor time of this process, which leaves out the time that other programs had the core; with
more threads it is wall time. The ratio is that of the sums over all rounds, because steps with and without a crop cost differently;
its quartiles are those of the paired rounds. Of methods with stages the one is timed in which most of the time goes:

    texq    the training of its generator
    synq    its images (the centre is one image a class)
    sadag   the refinement (its first stage is genie)

    python tools/bench_synthesis.py --path models --module cifar_resnet:resnet20 --weights models/resnet20_cifar10.safetensors --method all --markdown
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _plain_losses import LOSSES
from _plain_methods import Plain
from torch import Tensor, nn

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.bn_loss import SLACK
from zsq_deploy.calib.parts.engine import BatchRun, Objective, deterministic
from zsq_deploy.calib.parts.labels import Targets, find_labels
from zsq_deploy.calib.parts.memory import steady_memory
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import LatentImages
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Finished, Preparation, Recipe, stages
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.sizing import largest_batch
from zsq_deploy.calib.parts.terms import Context
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Model, Preprocess, load_model

# What differs from a method's defaults: things that are no part of a step's loss (clipping), or random in a way of their own (swing convolution).
_WITHOUT = {"clip": False, "swing": 0, "pictures": 0.0}
_TIMED = {"texq": (1, "generator"), "synq": (1, "images"), "sadag": (1, "refinement")}
# A quantized student's roundings flip: images that differ by a millionth have gradients that differ by half. Compared in double precision.
_CHAOTIC = ("sadag",)
_MOST = 128  # images of a batch, if not said otherwise


@dataclass(frozen=True)
class Case:
    """One method on one network.

    Attributes:
        method: Its name.
        module: The network as a torch module.
        model: The same as this project reads it.
        size: Of one image [C, H, W].
        batch: Images; 0: the method's own, at most 128.
    """

    method: str
    module: nn.Module
    model: Model
    size: tuple[int, ...]
    batch: int

    def sides(self, dtype: torch.dtype = torch.float32) -> tuple[BatchRun, Plain, str]:
        """This project's batch, the plain one, and the stage that they work on."""
        chosen = METHODS[self.method]
        assert chosen.run is not None
        parameters = {**chosen.defaults, **{key: _WITHOUT[key] for key in _WITHOUT if key in chosen.defaults}}
        number, stage = _TIMED.get(self.method, (0, ""))
        recipe = stages(chosen.run(parameters))[number]
        batch = self.batch or min(recipe.batch_size, _MOST)
        shape = (batch, *self.size)
        context, previous = self._context(recipe, shape, dtype)
        ours = Objective(
            recipe, context.network, context.spec, context.space, device=context.device, dtype=dtype, context=context
        )
        ours.piece = largest_batch(ours, self.size, batch, context.device, None)[1]
        memory = _memory(ours, recipe, shape)
        run, other = (BatchRun(ours, shape, 0, 0, memory=memory, previous=previous) for _ in range(2))
        module = self.module
        if dtype is not torch.float32:
            module = copy.deepcopy(module).to(dtype)
            for side in (run, other):
                for tensor in (tensor for group in side.parametrisation.groups().values() for tensor in group):
                    tensor.data = tensor.data.to(dtype)
        given = {
            "memory": memory,
            "slack": context.prepared.get(SLACK),
            "options": parameters,
            "centre": [
                (context.prepared[f"centre.mean.{layer}"].float(), context.prepared[f"centre.var.{layer}"].float())
                for layer in range(len(context.network.layers))
                if f"centre.mean.{layer}" in context.prepared
            ],
        }
        return run, Plain(self.method, module, recipe, other, context, given), stage

    def _context(self, recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Context, dict[str, Tensor]]:
        """What the recipe is bound to, and what the batch left in the stage before: the first two stages' images are noise here."""
        model, device = self.model, torch.device("cpu")
        space = InputSpace(None, None, None, None, None, None)
        labels = find_labels(model.graph, model.outputs)
        spec = model.inputs[0]
        context = Context(model, prepare(model), spec, space, labels, device, dtype)
        previous = {"images": torch.randn(shape, generator=batch_generator(1, "images", 0))}
        if self.method == "sadag":
            latent = LatentImages(shape, batch_generator(0, "images", 0))
            previous |= {f"parameters.{name}": value for name, value in latent.state().items()}
        if recipe.prepare is not None:
            made = recipe.prepare(Preparation(context, shape[0], shape[0], [previous]))
            context = replace(context, prepared=made)
        return context, previous


def _memory(ours: Objective, recipe: Recipe, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """As if a batch of noise had been made before; SADAG's first batch knows no other."""
    context = ours.context
    assert context is not None
    if recipe.remember is None or recipe.follows:
        return {}
    noise = torch.randn(shape, generator=batch_generator(2, "images", 0))
    targets = Targets(torch.arange(len(noise)) % (context.labels.classes if context.labels else 1))
    return dict(recipe.remember(Finished(noise, targets, {}, lambda names: ours.values(noise, names), context)))


def compared(run: BatchRun, plain: Plain) -> tuple[float, float]:
    """Relative errors of loss and gradient, after one step's choices on both sides.

    Raises:
        SystemExit: They are not the same loss.
    """
    images, scene, ours = run.parametrisation.images(), run.scene(), run.objective
    if scene.table is not None:
        ours.survey(images, scene)
    value = ours.backward(images, scene)["loss"]
    expected = plain.loss(plain.draw())
    expected.backward()  # type: ignore[no-untyped-call]
    mine = [tensor.grad for group in run.parametrisation.groups().values() for tensor in group]
    theirs = [tensor.grad for tensor in plain.parameters()]
    a, b = (torch.cat([g.flatten() for g in side if g is not None]) for side in (mine, theirs))
    error = abs(value - expected.item()) / abs(expected.item())
    gradient_error = float((a - b).norm() / b.norm())
    if error > 1e-4 or gradient_error > 2e-2:  # rectifiers flip where rounding decides, on either side
        raise SystemExit(
            f"{plain.method}: not the same loss: value differs by {error:.2e}, gradient by {gradient_error:.2e}"
        )
    return error, gradient_error


def raced(run: BatchRun, plain: Plain, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Both sides in turns."""

    def timed(step: Callable[[], object]) -> float:
        start = clock()
        step()
        return clock() - start

    def fast() -> float:
        with steady_memory(), deterministic():
            run.advance()  # the first step after a pause pays for memory that plain returned
            return timed(run.advance)

    def slow() -> float:
        plain.step()
        return timed(plain.step)

    pairs = [(slow(), fast()) for _ in range(rounds + 1)][1:]
    batch = run.shape[0]
    theirs, ours = (sum(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return {
        "plain_image_steps_per_second": batch * rounds / theirs,
        "image_steps_per_second": batch * rounds / ours,
        "ratio": theirs / ours,
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else [ratios[0]] * 2,
    }


def measured(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """One method: compared, then raced."""
    run, plain, stage = case.sides()
    if case.method in _CHAOTIC:
        error, gradient_error = compared(*case.sides(torch.float64)[:2])
    else:
        error, gradient_error = compared(run, plain)
    clock = time.process_time if threads == 1 else time.perf_counter
    return {
        "method": case.method,
        "stage": stage,
        "network": case.model.name,
        "batch": run.shape[0],
        "piece": run.objective.piece,
        "threads": threads,
        "clock": "process" if threads == 1 else "wall",
        "native_loops": native.kernels() is not None,
        "loss_relative_error": error,
        "gradient_relative_error": gradient_error,
        **raced(run, plain, rounds, clock),
    }


def table(results: list[Mapping[str, Any]]) -> str:
    """All results as a markdown table."""
    lines = [
        "| method | images | plain, image-steps/s | here, image-steps/s | ratio | quartiles | loss differs by | gradient differs by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        name = f"{row['method']} ({row['stage']})" if row["stage"] else row["method"]
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {name} | {row['batch']} | {row['plain_image_steps_per_second']:.0f} | {row['image_steps_per_second']:.0f} "
            f"| {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['loss_relative_error']:.0e} | {row['gradient_relative_error']:.0e} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="folder that the module is imported from")
    parser.add_argument("--module", default="cifar_resnet:resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--method", default="zeroq", help=f"all, or some of {','.join(LOSSES)}")
    parser.add_argument("--batch", type=int, default=0, help=f"0: the method's own, at most {_MOST}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one line a method, as soon as it is measured")
    form.add_argument("--markdown", action="store_true", help="a table at the end")
    options = parser.parse_args()
    options.methods = list(LOSSES) if options.method == "all" else options.method.split(",")
    unknown = sorted(set(options.methods) - set(LOSSES))
    if unknown:
        parser.error(f"no plain formulation of {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    return options


def main() -> None:
    """Compare, then race."""
    options = _arguments()
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
        preprocess=Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # the engine's space is the identity here
    )
    results = []
    for method in options.methods:
        try:
            result = measured(
                Case(method, module, model, tuple(options.shape), options.batch), options.rounds, options.threads
            )
        except CalibrationError as error:  # a network without what the method needs
            print(f"{method}: {error}", file=sys.stderr)
            continue
        results.append(result)
        if options.json:
            print(json.dumps(result), flush=True)
        elif not options.markdown:
            for key, item in result.items():
                print(f"{key:32} {item:.4g}" if isinstance(item, float) else f"{key:32} {item}", flush=True)
            print()
        else:
            print(f"{method}: {result['ratio']:.2f}", file=sys.stderr, flush=True)
    if options.markdown:
        print(table(results))


if __name__ == "__main__":
    main()
