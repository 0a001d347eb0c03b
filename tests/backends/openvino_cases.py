"""Small quantized networks for the integer reference of OpenVINO, written with OpenVINO's own operators and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from zsq_deploy.backends.openvino.runtime import ov

__all__ = ["CASES", "Made", "case"]

op: Any = ov.opset13
Made = tuple[Any, list[np.ndarray]]
"""A model, and one array an input."""


class Maker:
    """Random parts; `largest` bounds the codes of weights."""

    def __init__(self, seed: int, largest: int = 127) -> None:
        self.rng = np.random.default_rng(seed)
        self.largest = largest

    def limits(self, signed: bool = True, factor: float = 1.0) -> tuple[np.float32, np.float32]:
        step = np.float32(self.rng.uniform(0.005, 0.03) * factor)
        zero = int(self.rng.integers(1, 255)) if signed else 0
        return np.float32(-zero * step), np.float32((255 - zero) * step)

    def rounded(self, x: Any, signed: bool = True, factor: float = 4.0) -> Any:
        low, high = self.limits(signed, factor)
        return op.fake_quantize(x, low, high, low, high, 256)

    def weight(self, shape: tuple[int, ...], axis: int = 0) -> Any:
        codes = self.rng.integers(-self.largest, self.largest + 1, shape).astype(np.int8)
        form = [1] * len(shape)
        form[axis] = shape[axis]
        scale = self.rng.uniform(0.0005, 0.02, form).astype(np.float32)
        return op.multiply(op.convert(op.constant(codes), np.float32), op.constant(scale))

    def bias(self, shape: tuple[int, ...]) -> Any:
        return op.constant(self.rng.standard_normal(shape).astype(np.float32))

    def conv(self, x: Any, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> Any:
        pad = [kernel // 2] * 2
        y = op.convolution(x, self.weight((outputs, inputs, kernel, kernel)), [stride] * 2, pad, pad, [1, 1])
        return op.add(y, self.bias((1, outputs, 1, 1))) if bias else y

    def depthwise(self, x: Any, channels: int, kernel: int = 3, stride: int = 1) -> Any:
        pad = [kernel // 2] * 2
        y = op.group_convolution(x, self.weight((channels, 1, 1, kernel, kernel)), [stride] * 2, pad, pad, [1, 1])
        return op.add(y, self.bias((1, channels, 1, 1)))

    def image(self, channels: int, size: int, batch: int) -> tuple[Any, Any, np.ndarray]:
        x = op.parameter([-1, channels, size, size], np.float32, name="x")
        values = self.rng.standard_normal((batch, channels, size, size)).astype(np.float32) * np.float32(1.5)
        return x, self.rounded(x, factor=1.0), values


Case = Callable[[Maker], Made]
CASES: dict[str, Case] = {}


def _register(name: str) -> Callable[[Case], Case]:
    def put(function: Case) -> Case:
        CASES[name] = function
        return function

    return put


def case(name: str, seed: int, largest: int = 127) -> Made:
    """The model of that name and its inputs."""
    return CASES[name](Maker(seed, largest))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": op.relu,
    "clip": lambda y: op.clamp(y, 0.0, 6.0),
    "leaky": lambda y: op.prelu(y, op.constant(np.float32(0.1))),
    "hard swish": op.hswish,
    "sigmoid": op.sigmoid,
    "swish": op.swish,
    "gelu": lambda y: op.gelu(y, "erf"),
}


def _convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    bias: bool = True,
    activation: str = "",
    rounded: bool = True,
    depthwise: bool = False,
    size: int = 20,
) -> Case:
    def make(maker: Maker) -> Made:
        x, q, values = maker.image(inputs, size, 4)
        if depthwise:
            y = maker.depthwise(q, inputs, kernel, stride)
        else:
            y = maker.conv(q, inputs, outputs, kernel, stride, bias)
        if activation:
            y = _ACTIVATIONS[activation](y)
        if rounded:
            y = maker.rounded(y, activation not in ("relu", "clip", "sigmoid"))
        return ov.Model([op.result(y)], [x]), [values]

    return make


CASES |= {
    "conv 3x3": _convolution(16, 32, 3),
    "conv 3x3, no bias": _convolution(16, 32, 3, bias=False),
    "conv 3x3, float output": _convolution(16, 32, 3, rounded=False),
    "conv 3x3, odd channels": _convolution(5, 7, 3),
    "conv 7x7, stride 2": _convolution(3, 16, 7, stride=2, size=32),
    "conv 1x1": _convolution(32, 64, 1),
    "conv 1x1, stride 2": _convolution(32, 64, 1, stride=2),
    "depthwise 3x3": _convolution(32, 32, 3, depthwise=True),
    "depthwise 3x3, stride 2": _convolution(32, 32, 3, depthwise=True, stride=2),
    "depthwise 5x5, odd channels": _convolution(20, 20, 5, depthwise=True, activation="relu"),
    "depthwise 3x3, float output": _convolution(32, 32, 3, depthwise=True, rounded=False),
    **{f"conv 3x3 {name}": _convolution(16, 32, 3, activation=name) for name in _ACTIVATIONS},
    **{
        f"conv 3x3 {name}, float output": _convolution(16, 32, 3, activation=name, rounded=False)
        for name in _ACTIVATIONS
    },
}


def _two(name: str, build: Callable[[Maker, Any], Any]) -> None:
    """A case behind one rounded image of 24 channels."""

    def make(maker: Maker) -> Made:
        x, q, values = maker.image(24, 16, 4)
        return ov.Model([op.result(build(maker, q))], [x]), [values]

    CASES[name] = make


def _c(maker: Maker, x: Any, outputs: int = 24, kernel: int = 3, inputs: int = 24) -> Any:
    return maker.conv(x, inputs, outputs, kernel)


_SPACE = np.array([2, 3])
_two("residual", lambda m, q: m.rounded(op.relu(op.add(_c(m, q), q)), False))
_two("residual of two layers", lambda m, q: m.rounded(op.add(_c(m, q), m.rounded(_c(m, q)))))
_two("residual, both rounded", lambda m, q: m.rounded(op.add(m.rounded(_c(m, q)), q)))
_two("sum of two accumulators", lambda m, q: m.rounded(op.add(_c(m, q), _c(m, q))))
_two("sum of codes", lambda m, q: m.rounded(op.add(m.rounded(_c(m, q)), m.rounded(_c(m, q)))))
_two(
    "product of codes",
    lambda m, q: m.rounded(op.multiply(m.rounded(_c(m, q)), m.rounded(op.sigmoid(_c(m, q)), False, 0.3))),
)
_two("concatenation", lambda m, q: _c(m, op.concat([m.rounded(_c(m, q)), m.rounded(_c(m, q))], 1), 24, 1, 48))
_two("max pool", lambda m, q: _c(m, op.max_pool(m.rounded(_c(m, q)), [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)))
_two("mean pool", lambda m, q: _c(m, m.rounded(op.avg_pool(m.rounded(_c(m, q)), [2, 2], [0, 0], [0, 0], [2, 2], True))))
_two(
    "mean pool with padding",
    lambda m, q: _c(m, m.rounded(op.avg_pool(m.rounded(_c(m, q)), [1, 1], [1, 1], [1, 1], [3, 3], False))),
)
_two(
    "mean pool without padding",
    lambda m, q: _c(m, m.rounded(op.avg_pool(m.rounded(_c(m, q)), [1, 1], [1, 1], [1, 1], [3, 3], True))),
)
_two(
    "mean pool, not rounded", lambda m, q: _c(m, op.avg_pool(m.rounded(_c(m, q)), [2, 2], [0, 0], [0, 0], [2, 2], True))
)
_two(
    "mean of all", lambda m, q: _c(m, m.rounded(op.reduce_mean(m.rounded(_c(m, q)), op.constant(_SPACE), True)), 24, 1)
)
_two("mean of all, float output", lambda m, q: op.reduce_mean(m.rounded(_c(m, q)), op.constant(_SPACE), False))
_two(
    "nearest resize",
    lambda m, q: _c(
        m,
        op.interpolate(
            m.rounded(_c(m, q)), op.constant(np.array([32, 32])), "nearest", "sizes", axes=op.constant(_SPACE)
        ),
    ),
)
_two("depth to space", lambda m, q: _c(m, op.depth_to_space(m.rounded(_c(m, q)), "blocks_first", 2), 24, 3, 6))
_two(
    "transposed convolution",
    lambda m, q: m.rounded(
        op.add(
            op.convolution_backprop_data(q, m.weight((24, 16, 4, 4), 1), [2, 2], None, [1, 1], [1, 1], [1, 1]),
            m.bias((1, 16, 1, 1)),
        )
    ),
)
_two("factor a channel", lambda m, q: m.rounded(op.multiply(_c(m, q), m.bias((1, 24, 1, 1)))))
_two("slope a channel", lambda m, q: m.rounded(op.prelu(_c(m, q), m.bias((1, 24, 1, 1)))))


def _split(maker: Maker, q: Any) -> Any:
    left, right = op.split(maker.rounded(_c(maker, q)), op.constant(1), 2).outputs()
    return op.add(_c(maker, left, 24, 3, 12), _c(maker, right, 24, 3, 12))


def _squeeze_and_excite(maker: Maker, q: Any) -> Any:
    gate = maker.rounded(op.reduce_mean(q, op.constant(_SPACE), True))
    gate = maker.rounded(op.relu(_c(maker, gate, 8, 1)), False)
    gate = maker.rounded(op.hsigmoid(_c(maker, gate, 24, 1, 8)), False, 0.3)
    return maker.rounded(op.multiply(q, gate))


def _rounded_by_channel(maker: Maker, q: Any) -> Any:
    low = -maker.rng.random((1, 24, 1, 1)).astype(np.float32) * 4
    high = maker.rng.random((1, 24, 1, 1)).astype(np.float32) * 4
    return op.fake_quantize(_c(maker, q), low, high, low, high, 256)


_two("split", _split)
_two("squeeze and excite", _squeeze_and_excite)
_two("rounded by channel", _rounded_by_channel)


@_register("bias that only a requantization reads")
def _lost_bias(maker: Maker) -> Made:
    """The scaled accumulator is read as well, so the bias moves into the requantization, which mistakes it (2026.4)."""
    x, q, values = maker.image(3, 16, 4)
    y = maker.conv(q, 3, 24, bias=False)
    rounded = maker.rounded(op.add(y, maker.bias((1, 24, 1, 1))))
    return ov.Model([op.result(rounded), op.result(y)], [x]), [values]


def _dense(name: str, build: Callable[[Maker, Any, Any], Any], rows: tuple[int, ...] = (512,)) -> None:
    def make(maker: Maker) -> Made:
        x = op.parameter([-1, *rows[1:], 96], np.float32, name="x")
        q = maker.rounded(x, factor=1.0)
        y = op.matmul(q, maker.weight((40, 96)), False, True)
        bias = maker.bias((*(1 for _ in rows), 40))
        values = maker.rng.standard_normal((*rows, 96)).astype(np.float32)
        return ov.Model([op.result(build(maker, y, bias))], [x]), [values]

    CASES[name] = make


_dense("dense, float output", lambda m, y, b: op.add(y, b))
_dense("dense, no bias", lambda m, y, b: y)
_dense("dense", lambda m, y, b: m.rounded(op.add(y, b)))
_dense("dense relu", lambda m, y, b: m.rounded(op.relu(op.add(y, b)), False))
_dense("dense, three axes", lambda m, y, b: m.rounded(op.add(y, b)), (32, 13))


@_register("product of two activations")
def _product(maker: Maker) -> Made:
    a = op.parameter([-1, 4, 20, 32], np.float32, name="a")
    b = op.parameter([-1, 4, 24, 32], np.float32, name="b")
    low, high = np.float32(-2), np.float32(2 * 127 / 128)
    left, right = (op.fake_quantize(p, low, high, low, high, 256) for p in (a, b))
    y = op.matmul(left, right, False, True)
    values = [maker.rng.standard_normal((8, 4, rows, 32)).astype(np.float32) for rows in (20, 24)]
    return ov.Model([op.result(maker.rounded(y))], [a, b]), values
