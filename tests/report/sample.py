"""A report with everything in it, put together from the real result types of `zsq_deploy.verify`."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.base import KernelRecord
from zsq_deploy.report import (
    accuracy_section,
    contact_sheet,
    finish,
    integer_section,
    latency_section,
    layers_section,
    parity_section,
)
from zsq_deploy.verify import Comparison, Gates, Latency, TensorWalk, evaluate, prove

TENSORS = [
    "input",
    *(f"layer{stage}.{block}.{part}" for stage in (1, 2, 3) for block in range(3) for part in ("relu", "add")),
    "pool",
    "logits",
]


def latency(median, mode, seed):
    rng = np.random.default_rng(seed)
    times = median * (1 + np.abs(rng.normal(0, 0.04, 400)))
    p25, p50, p75, p90, p95, p99 = (float(v) for v in np.percentile(times, [25, 50, 75, 90, 95, 99]))
    return Latency(
        median_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        iqr_ms=p75 - p25,
        mean_ms=float(times.mean()),
        min_ms=float(times.min()),
        runs=400,
        threads=1,
        batch=1,
        first_ms=p50 * 3.1,
        load_ms=18.0 + median,
        peak_rss_bytes=91_000_000,
        added_rss_bytes=21_000_000,
        mode=mode,
    )


def evaluation(count=1000, estimate=False):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 10, count)
    logits = rng.normal(0, 2.0, (count, 10)).astype(np.float32)
    logits[np.arange(count), labels] += 5.5
    step = 0.09
    twin = np.rint((logits + rng.normal(0, 0.12, logits.shape)) / step) * step
    engine = twin + step * rng.choice([-2, -1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2], size=twin.shape)
    table = {"float": logits, "reference": twin, "integer": engine, "unfused": engine + 0, "engine": engine}

    def looked_up(values):
        return lambda feeds: {"logits": values[feeds["index"]]}

    batches = ((np.arange(i, i + 100), None if estimate else labels[i : i + 100]) for i in range(0, count, 100))
    return evaluate(
        (({"index": index}, wanted) for index, wanted in batches),
        {form: looked_up(values) for form, values in table.items()},
        steps={"logits": step},
    )


def walk():
    rng = np.random.default_rng(2)
    found = TensorWalk(TENSORS, dict.fromkeys(TENSORS, 0.05))
    reference = {name: rng.integers(0, 255, (4, 200)) * 0.05 for name in TENSORS}
    engine = {}
    for place, name in enumerate(TENSORS):
        flips = rng.random((4, 200)) < max(0, place - 4) / 300
        engine[name] = reference[name] + 0.05 * flips
    found.update(engine, reference)
    return found.result()


def layers():
    rng = np.random.default_rng(3)
    found = TensorWalk(TENSORS)
    floating = {name: rng.normal(size=(4, 300)) for name in TENSORS}
    noise = {name: 10 ** (-(46 - 0.9 * place - 6 * (place % 5 == 3)) / 20) for place, name in enumerate(TENSORS)}
    found.update(
        {name: value + rng.normal(size=value.shape) * noise[name] for name, value in floating.items()}, floating
    )
    return found.result().tensors


def target(*, estimate=False, speed=1.0):
    proof = prove(
        [
            *(
                KernelRecord(f"conv{i}_quant", "QLinearConv", True, 14.0 + i % 5, (f"conv{i}",), 2_100_000)
                for i in range(19)
            ),
            *(KernelRecord(f"add{i}_quant", "QLinearAdd", True, 4.2) for i in range(9)),
            KernelRecord("pool_quant", "QLinearGlobalAveragePool", True, 3.0),
            KernelRecord("fc", "MatMulIntegerToFloat", True, 2.4, ("fc",), 640),
            KernelRecord("input_QuantizeLinear", "QuantizeLinear", False, 5.5, reason="the input arrives in float"),
            KernelRecord("pool_DequantizeLinear", "DequantizeLinear", False, 1.0, reason="the output stays in float"),
        ]
    )
    comparison = Comparison(
        {
            "engine": latency(0.412 * speed, "int8 engine, all optimizations", 0),
            "float32": latency(0.951, "fp32, all optimizations", 1),
            "float_best": latency(0.874, "fp32, 1 thread, NCHWc layout", 2),
        },
        {
            "engine": (0.41 * speed, 0.42 * speed, 0.43 * speed),
            "float32": (0.95, 0.97, 0.96),
            "float_best": (0.87, 0.88, 0.9),
        },
    )
    result = evaluation(estimate=estimate)
    return {
        "runtime": "onnxruntime",
        "runtime_version": "1.32.0",
        "summary": "x86-64 with AVX-512 VNNI or AVX-VNNI.",
        "activation": "u8 asymmetric per tensor",
        "weight": "s8 symmetric per channel",
        "engine": {
            "path": "ort-x86-vnni/engine.onnx",
            "bytes": 311_204,
            "sha256": "9f" * 32,
            "choices": {"op_types": ["Conv", "Gemm", "Add"], "range_method": "mse", "bias_correction": {"images": 256}},
            "candidates": [
                {
                    "name": "everything in integers",
                    "chosen": True,
                    "median_ms": 0.412,
                    "sqnr_db": 29.4,
                    "agreement": 0.991,
                    "macs_share": 1.0,
                    "bytes": 311_204,
                    "reason": "the fastest one that keeps its SQNR",
                },
                {
                    "name": "additions in float",
                    "median_ms": 0.502,
                    "sqnr_db": 29.9,
                    "agreement": 0.992,
                    "macs_share": 1.0,
                    "bytes": 310_900,
                    "reason": "slower: a conversion around every addition",
                },
            ],
        },
        "float_model": {"path": "float.onnx", "bytes": 1_083_000},
        "integer": integer_section(proof),
        "parity": parity_section(result, walk()),
        "accuracy": accuracy_section(result),
        "latency": latency_section(comparison, float_best="float_best"),
        "layers": layers_section(layers()),
        "notes": ["Weights are stored per output channel; activations have one scale a tensor."],
    }


def quality():
    return {
        "images": 256,
        "held_out": 64,
        "pictures": 32,
        "coverage": {
            "summary": 0.684,
            "judged": len(TENSORS),
            "below_half": 1,
            "worst": {"name": "logits", "share": 0.265},
            "unexcited": 0.0285,
            "clipped": 0.0066,
            "excess_bits": 0.02,
        },
        "batch_norm": {
            "images": 64,
            "mean": 0.034,
            "spread": 0.056,
            "kl": 0.007,
            "layers": [
                {"name": f"bn{i}", "channels": 16, "mean": 0.02 + 0.002 * i, "spread": 0.05, "kl": 0.007}
                for i in range(19)
            ],
        },
        "diversity": {
            "images": 256,
            "feature": "pool",
            "effective_images": 1.3,
            "effective_directions": 24.7,
            "mean_cosine": 0.96,
            "classes": 10,
            "classes_seen": 8,
            "effective_classes": 5.2,
            "confidence": 0.36,
        },
        "agreement": {"images": 64, "top1": 0.97, "sqnr_db": 24.0},
        "real": {
            "images": 256,
            "extent_bits": 0.54,
            "magnitude_bits": 0.53,
            "bias_bits": -0.54,
            "clipped": 0.0154,
            "worst": [{"name": "logits", "extent_bits": -2.64}],
        },
        "tensors": [
            {
                "name": name,
                "share_implied": 0.9 if i % 2 else None,
                "share_witnessed": 0.265 if name == "logits" else 0.7,
                "clipped": 0.001,
                "channels": 16,
                "real_extent_bits": -2.64 if name == "logits" else -0.3,
                "real_magnitude_bits": -0.3,
                "real_clipped": 0.01,
            }
            for i, name in enumerate(TENSORS)
        ],
    }


def parts(*, targets=1, estimate=False):
    rng = np.random.default_rng(0)
    low = rng.normal(size=(24, 3, 4, 4))
    images = np.kron(low, np.ones((1, 1, 8, 8))) + rng.normal(size=(24, 3, 32, 32)) * 0.25
    names = ["ort-x86-vnni", "ort-x86-avx2", "ort-arm64"][:targets]
    return {
        "seconds": 96.4,
        "model": {
            "name": "resnet20_cifar10",
            "source": "resnet20_cifar10.onnx",
            "digest": "5c" * 32,
            "inputs": [{"name": "input", "shape": [None, 3, 32, 32]}],
            "outputs": [{"name": "logits", "shape": [None, 10]}],
            "nodes": 73,
            "parameters": 269_722,
            "macs": 40_813_184,
            "batch_norms": 19,
            "preprocess": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "raw_pixels": False},
        },
        "calibration": {
            "method": "zeroq",
            "images": 256,
            "seconds": 71.5,
            "peak_rss_bytes": 812_000_000,
            "device": "cpu",
            "seed": 0,
            "parameters": {"steps": 500, "optimizer": {"name": "adam", "lr": 0.1}},
            "preview": contact_sheet(images, total=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            "range_method": "mse",
            "ranges_seconds": 3.2,
            "ranges": [
                {
                    "name": name,
                    "op": "Relu",
                    "low": -0.3 * (i % 3),
                    "high": 1.5 + 0.9 * i,
                    "seen_low": -0.3 * (i % 3) * 1.05,
                    "seen_high": 1.7 + 1.0 * i,
                    "unexcited_channels": int(i == 7),
                }
                for i, name in enumerate(TENSORS)
            ],
            "quality": quality(),
            "recommendation": {
                "method": "zeroq",
                "images": 256,
                "expected_seconds": 70.0,
                "reasons": ["zeroq lost 0.1 points in W8A8 on networks of this kind, genie 0.4."],
            },
            "notes": ["2 of 784 channels were never excited (layer1.1.relu)."],
        },
        "evaluation": {
            "kind": "synthetic" if estimate else "labelled",
            "estimate": estimate,
            "images": 1000,
            "source": "" if estimate else "cifar10_test.npz",
            "note": "Measured on held-out synthetic images: an estimate."
            if estimate
            else "Measured on the labelled images of cifar10_test.npz, which were used for nothing else.",
        },
        "targets": {name: target(estimate=estimate, speed=1 + 0.4 * i) for i, name in enumerate(names)},
        "baselines": [
            {
                "method": "zeroq",
                "target": names[0],
                "images": 256,
                "seconds": 71.5,
                "engine": 0.9218,
                "agreement": 0.991,
                "sqnr_db": 29.4,
            },
            {
                "method": "real",
                "target": names[0],
                "images": 256,
                "engine": 0.9228,
                "agreement": 0.992,
                "sqnr_db": 29.6,
                "note": "the user's own images",
            },
            {
                "method": "gaussian",
                "target": names[0],
                "images": 256,
                "seconds": 0.1,
                "engine": 0.9206,
                "agreement": 0.988,
                "sqnr_db": 27.0,
            },
            {
                "method": "ones",
                "target": names[0],
                "images": 256,
                "seconds": 0.1,
                "engine": 0.266,
                "agreement": 0.27,
                "sqnr_db": 1.8,
            },
        ]
        if names
        else [],
        "environment": {
            "machine": {
                "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
                "flags": ["avx2", "avx512f", "avx512_vnni"],
                "logical_cpus": 2,
                "governor": None,
                "load_average": [0.3, 0.2, 0.1],
                "memory_bytes": 16_000_000_000,
            },
            "python": "3.11.2",
            "versions": {"numpy": "2.2.0", "onnxruntime": "1.32.0", "torch": "2.13.0"},
            "threads": 1,
            "command": "zsq deploy resnet20_cifar10.onnx --target ort-x86-vnni --eval-data cifar10_test.npz -o out",
        },
        "recipe": {
            "model": {"source": "resnet20_cifar10.onnx"},
            "synthesis": {"method": "zeroq", "images": 256},
            "seed": 0,
        },
    }


GATES = Gates(
    min_agreement=0.9, max_accuracy_drop=0.02, min_speedup=2.0, min_integer_macs=1.0, min_integer_equal=0.9999
)


def report(*, targets=1, estimate=False, gates=GATES):
    return finish(parts(targets=targets, estimate=estimate), gates)
