"""The network's forward pass and the statistics in it as one function made by `torch.compile`, for those who ask for it.

The loops that measure a value while it is passed on (:mod:`.moments`) are not torch's, so a compiler cannot look into them. Here the same is
written in torch's operators, and what fuses them is the compiler's business. Results agree with the uncompiled ones up to rounding; they are
their own bits again on every run with the same seed, versions and machine.

Swing convolution moves maps by other amounts in every step, each of which would be another program: a stage with it runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import BNMatcher, Observed
from zsq_deploy.calib.parts.moments import watch_plainly
from zsq_deploy.errors import CalibrationError, ZsqError
from zsq_deploy.model import Twin

__all__ = ["CompiledNetwork", "not_compiled"]


class CompiledNetwork:
    """A network under the watch of a matcher, compiled when it is first run with a new shape.

    Args:
        twin: The network.
        feed: Name of its input.
        fetch: Values that are wanted.
        matcher: Whose statistics are taken; ``None``: none.
    """

    def __init__(self, twin: Twin, feed: str, fetch: Sequence[str], matcher: BNMatcher | None) -> None:
        wanted, seen = tuple(fetch), () if matcher is None else matcher.values
        taps = {} if matcher is None else matcher.taps({})
        # The image itself, where it counts as a layer, is no value of the graph and measured outside.
        inside = frozenset(name for name in taps if name in twin.input_names or twin.graph.producer(name) is not None)

        def forward(images: Tensor) -> tuple[tuple[Tensor, ...], tuple[tuple[str, Tensor, Tensor], ...]]:
            store: dict[str, Observed] = {}
            taps = {} if matcher is None else matcher.taps(store, watch_plainly)
            values = twin.run({feed: images}, wanted, {name: tap for name, tap in taps.items() if name in inside})
            found = tuple((name, store[name].mean, store[name].var) for name in seen if name in store)
            return tuple(values[name] for name in wanted), found

        # Programs are kept by code object, and few of them: every network gets one of its own.
        code = forward.__code__.replace()
        own_forward = FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
        self._wanted = wanted
        self._run: Callable[..., Any] = torch.compile(own_forward, dynamic=False, fullgraph=True)

    def run(self, images: Tensor, store: dict[str, Observed]) -> dict[str, Tensor]:
        """The wanted values for images in the network's input space; the statistics go to `store`."""
        values, found = self._run(images)
        store.update({name: Observed(mean, var) for name, mean, var in found})
        return dict(zip(self._wanted, values, strict=True))


def not_compiled(error: Exception) -> ZsqError:
    """What to say when the compiler gave up."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return CalibrationError(
        f"torch.compile could not make a program of the network ({reason[:300]})",
        where="--compile",
        remedy="on a CPU it needs a C++ compiler (g++ or clang++, or its name in CXX), on a GPU Triton; without --compile the same images are made, up to rounding",
    )
