"""How many images are made together, and how many are worked through at a time.

Both depend on the network and on the machine's total memory, never on what happens to be free, so that a run can be repeated.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import psutil
import torch
from torch import Tensor

from zsq_deploy.calib.parts.engine import Objective

__all__ = ["batch_sizes", "largest_batch"]

# What the pieces of a batch may keep for the gradient: enough to keep convolutions busy, little enough to be kind to memory.
_PIECE_BYTES = 512 * 2**20
_SMALLEST_PIECE = 8
# Share of the machine's memory that activations kept for the gradient may take.
_MEMORY_SHARE = 0.35


def batch_sizes(images: int, largest: int, unit: int = 1) -> list[int]:
    """Cut `images` into as few batches as `largest` allows, of equal size to within one `unit`.

    `unit` is the batch size of a network that takes no other; the last batch may then hold some images too many.
    """
    units = math.ceil(images / unit)
    count = math.ceil(units / max(1, largest // unit))
    small, extra = divmod(units, count)
    return [(small + (index < extra)) * unit for index in range(count)]


def largest_batch(
    objective: Objective,
    shape: tuple[int, ...],
    wanted: int,
    device: torch.device,
    fixed: int | None,
    *,
    share: float = 1.0,
) -> tuple[int, int | None, str | None]:
    """Largest batch and piece for this network and machine, and a note when the batch became smaller than wanted.

    Both depend on the network and the machine's total memory only, not on what is free at the moment.

    Args:
        objective: The loss.
        shape: Of one image.
        wanted: Images of a batch.
        device: Where it is computed.
        fixed: The only batch size that the network takes; ``None``: any.
        share: Part of the memory that is for this process.
    """
    if fixed is not None:  # a network that takes one batch size only
        if objective.recipe.separable or objective.recipe.piece:
            return max(fixed, wanted // fixed * fixed), fixed, None
        note = (
            f"the network takes batches of {fixed} only, so statistics are matched over {fixed} image(s) at a time instead "
            f"of {wanted}; export it with a free batch dimension for the published method"
        )
        return fixed, None, note
    kept = _probe(objective, shape, device) * objective.recipe.passes
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _memory()
    if device.type == "cpu" or torch.cuda.device_count() <= 1:  # several GPUs are not shared
        total = int(total * share)
    fits = max(1, int(_MEMORY_SHARE * total / max(kept, 1)))
    if objective.recipe.piece:
        # Pixels, their gradient and two moments of the optimiser stay in memory for all images.
        room = max(1, int(_MEMORY_SHARE * total / (16 * math.prod(shape))))
        return min(wanted, room), min(objective.recipe.piece, fits), None
    if objective.recipe.separable:
        piece = fits if device.type == "cuda" else max(_SMALLEST_PIECE, _PIECE_BYTES // kept)
        return wanted, min(piece, fits), None
    if wanted <= fits:
        return wanted, None, None
    note = (
        f"batches of {fits} images instead of {wanted}: the gradient of one image keeps {kept / 2**20:.0f} MiB, and "
        f"{_MEMORY_SHARE:.0%} of {total / 2**30:.1f} GiB of memory is used at most"
    )
    return fits, None, note


def _probe(objective: Objective, shape: tuple[int, ...], device: torch.device) -> int:
    """Bytes that the gradient of one image keeps, from a forward pass over two."""
    seen: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in objective.twin.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    if noise.dim() == 4:
        noise = noise.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective.losses(noise.requires_grad_(), objective.rehearsal(tuple(noise.shape)))
    del losses
    # Gradients, temporaries and the allocator's slack come on top of what is kept.
    return int(1.5 * sum(seen.values()) / 2) + 1


def _memory() -> int:
    """Memory of this machine, or of the container it is running in."""
    total = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total
