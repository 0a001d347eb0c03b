"""One step of a block against the loss as the papers write it, the store of activations, and the benchmark."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model.model import Model
from zsq_deploy.progress import SILENT
from zsq_deploy.quant.fakequant import fake_quant
from zsq_deploy.quant.reconstruct import Preset
from zsq_deploy.quant.reconstruct.api import start
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.learn import block_loss
from zsq_deploy.quant.reconstruct.quantizers import initial_logits
from zsq_deploy.quant.reconstruct.work import Work

from .nets import images, small_net

TOOLS = Path(__file__).parent.parent.parent / "tools"
QUIET = Preset("quiet", steps=10, batch=8, drop=0.0)


def watch_blocks(look, preset=QUIET, bits="w3a3", count=16):
    """Run a reconstruction whose blocks are handed to `look` instead of learning."""
    model = Model(small_net(3), name="small")
    x = images(count, seed=2)
    data = CalibrationSet.from_arrays({"image": x}, CalibrationManifest.of(model, method="gaussian"))
    template, _, state = start(model, data, bits, "ends-8bit", device=torch.device("cpu"))
    with Cache(count) as cache:
        Work(template, state, preset, 0, torch.device("cpu"), cache, None, SILENT, look).run(data)


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradients_of_a_block_are_those_of_the_written_loss(relative):
    checked = []

    def look(learner, cache, count, task):
        if len(learner.layers) < 2:
            return 0.0
        chosen = np.arange(8)
        strength, beta = 0.1, 6.0
        stepper = learner.stepper(cache)
        # what one step computes, without its update
        inputs = learner.inputs(cache, chosen, 0.0, 0)
        found = learner.outputs(inputs, strength=strength, beta=beta, share=0.0, step=0)
        (name,) = learner.block.outputs
        difference = found[name].detach() - cache.take(f"f:{name}", chosen)
        gradient = 2.0 * difference / (difference.numel() / difference.shape[1])
        factors = [learner.factors[group] for group in learner.groups()]
        parameters = [*(item.logits for item in learner.layers), *(item.factor for item in learner.layers), *factors]
        mine = torch.autograd.grad(found[name], parameters, gradient)

        # the same with torch's own operators from the block's float graph on
        fresh, constants, penalty, clear = [], {}, torch.zeros(()), []
        for item in learner.layers:
            weight = learner.state.weights[item.layer.node]
            w = torch.from_numpy(np.array(learner.runner.template.weights[item.layer.weight]))
            scale = torch.from_numpy(np.array(weight.along(weight.scale)))
            base, logits = initial_logits(w, scale)
            logits.requires_grad_()
            factor = (torch.ones_like(scale) if relative else scale.clone()).requires_grad_()
            h = torch.clamp(torch.sigmoid(logits) * 1.2 - 0.1, 0, 1)
            used = factor * scale if relative else factor
            constants[item.layer.weight] = torch.clamp(base + h, weight.scheme.qmin, weight.scheme.qmax) * used
            constants[item.layer.bias] = torch.from_numpy(learner.state.bias_numbers(item.layer).copy())
            penalty = penalty + strength * (1 - (2 * h - 1).abs() ** beta).sum()
            fresh.append((logits, factor))
            raw = (base + h).detach()
            # on an edge of the range or of the sigmoid the last bit decides between the gradients of its two sides
            edges = [raw - weight.scheme.qmin, raw - weight.scheme.qmax, h.detach(), h.detach() - 1]
            clear.append(torch.stack([edge.abs() > 1e-4 for edge in edges]).all(0))
        scales = {}
        for group in learner.groups():
            start_scale = learner.state.activations[group].scale
            scales[group] = torch.tensor(1.0 if relative else start_scale, requires_grad=True)

        def tap(site):
            activation = learner.state.activations[site.group]

            def rounded(x):
                scale = scales[site.group] * (activation.scale if relative else 1.0)
                zero = torch.tensor(float(activation.zero_point))
                scheme = activation.scheme
                return fake_quant(x, scale, zero, scheme.qmin, scheme.qmax)

            return rounded

        taps = {site.output: tap(site) for site in learner.sites}
        y = learner.runner.learning(learner.block, inputs, constants, taps)[name]
        loss = block_loss(y, cache.take(f"f:{name}", chosen), 1) + penalty
        expected = torch.autograd.grad(
            loss, [*(a for a, _ in fresh), *(b for _, b in fresh), *(scales[group] for group in learner.groups())]
        )
        assert all(mask.float().mean() > 0.9 for mask in clear)
        for index, (a, b) in enumerate(zip(mine, expected, strict=True)):
            if index < len(clear):
                a, b = a * clear[index], b * clear[index]
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)
        value = stepper.step(chosen, 0, strength=strength, beta=beta, falling=1.0, report=True)
        assert value == pytest.approx(float((loss - penalty).detach()), rel=1e-4)
        checked.append(learner.block.name)
        return 0.0

    watch_blocks(look, dataclasses.replace(QUIET, relative=relative))
    assert checked


def test_rates_and_regulariser_follow_the_schedule():
    seen = []

    def look(learner, cache, count, task):
        class Recorder:
            def step(self, chosen, step, *, strength, beta, falling, report):
                seen.append((step, strength, beta, falling, len(chosen)))
                return 1.0

        learner.stepper = lambda cache: Recorder()
        learner.run(cache, count, task)
        return 0.0

    preset = dataclasses.replace(QUIET, steps=100, regulariser=0.5)
    with SILENT.task("x", 1) as bar:
        assert bar is not None
    watch_blocks(look, preset)
    first = seen[:100]
    assert [strength for _, strength, *_ in first[:20]] == [0.0] * 20
    assert {strength for _, strength, *_ in first[20:]} == {0.5}
    betas = [beta for _, _, beta, *_ in first]
    assert betas[20] == 20.0
    assert betas[60] == pytest.approx(11.0)
    assert betas[99] == pytest.approx(2.225)
    assert [falling for *_, falling, _ in (first[0], first[50])] == pytest.approx([1.0, 0.5])
    assert {batch for *_, batch in first} == {8}


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_activations_come_back_as_they_were_put(tmp_path, memory):
    rng = np.random.default_rng(0)
    planes = torch.from_numpy(rng.normal(size=(10, 3, 4, 5)).astype(np.float32))
    tokens = torch.from_numpy(rng.normal(size=(6, 10, 7)).astype(np.float32))  # the images are axis 1
    with Cache(10, tmp_path, memory=memory) as cache:
        for at in range(0, 10, 4):
            cache.put("planes", at, planes[at : at + 4])
            cache.put("tokens", at, tokens[:, at : at + 4], axis=1)
        assert (cache.on_disk > 0) == (memory == 0)
        chosen = np.array([7, 0, 3])
        assert torch.equal(cache.take("planes", chosen), planes[chosen])
        assert torch.equal(cache.take("tokens", chosen), tokens[:, chosen])
        assert cache.take("planes", chosen).is_contiguous(memory_format=torch.channels_last)
        files = list(tmp_path.rglob("*.bin"))
        assert len(files) == (2 if memory == 0 else 0)
        cache.drop("planes")
        assert "planes" not in cache
        assert len(list(tmp_path.rglob("*.bin"))) == max(len(files) - 1, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_measures_both_formulations():
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    bench = importlib.import_module("bench_reconstruct")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    ).eval()
    rows = bench.measure(net, 8, images=8, batch=4, steps=2, rounds=1)
    assert len(rows) == 3
    assert all(row.plain > 0 and row.ours > 0 for row in rows)
