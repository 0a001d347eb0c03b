"""Block reconstruction: low-bit weights and activations learned block by block from (synthetic) images.

The recipe is that of Genie-M (Jeon et al. 2023, arXiv:2212.04780, section 3.2): rounding and weight scales learned together (AdaRound, Nagel et al.
2020), a block at a time (BRECQ, Li et al. 2021), with learned activation scales (LSQ, Esser et al. 2020) and random dropping of activation
rounding (QDrop, Wei et al. 2022). It starts from a Q/DQ graph rounded to nearest, and gives one.
"""

from zsq_deploy.quant.reconstruct.api import BlockReport, Reconstruction, reconstruct, round_to_nearest
from zsq_deploy.quant.reconstruct.blocks import Block, find_blocks
from zsq_deploy.quant.reconstruct.presets import PRESETS, Preset, Tuning
from zsq_deploy.quant.reconstruct.protocol import PROTOCOLS, Bits, LayerBits, Protocol
from zsq_deploy.quant.reconstruct.writing import clip_codes

__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "Bits",
    "Block",
    "BlockReport",
    "LayerBits",
    "Preset",
    "Protocol",
    "Reconstruction",
    "Tuning",
    "clip_codes",
    "find_blocks",
    "reconstruct",
    "round_to_nearest",
]
