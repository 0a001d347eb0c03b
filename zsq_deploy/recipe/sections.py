"""What a recipe says about the network, the images, the measurements and the run; quantization has a module of its own."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from zsq_deploy.recipe.values import Numbers, Section, Shapes, Share

__all__ = ["CalibrationSection", "GatesSection", "ModelSection", "RunSection", "VerificationSection"]


class ModelSection(Section):
    """The network and how images become its input."""

    source: str = Field(
        min_length=1,
        description="The network: an .onnx file, an exported .pt2 file, module:callable, or timm:NAME.",
    )
    path: str | None = Field(default=None, description="Folder that module:callable is imported from.")
    weights: str | None = Field(
        default=None, description="Weights for module:callable: .safetensors, or .pt/.pth (never unpickled)."
    )
    input_shape: Shapes | None = Field(
        default=None, description="Shape of the input, 1x3x32x32; with several inputs a mapping from name to shape."
    )
    mean: Numbers | None = Field(default=None, description="Mean per channel of RGB (or gray) divided by 255.")
    std: Numbers | None = Field(
        default=None, description="Standard deviation per channel of RGB (or gray) divided by 255."
    )
    raw_pixels: bool = Field(
        default=False, description="The network takes pixels 0..255 as they are; excludes mean and std."
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ModelSection:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        if self.raw_pixels and self.mean is not None:
            raise ValueError("raw_pixels excludes mean and std: the network takes either 0..255 or normalized values")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
            if min(self.std) <= 0:
                raise ValueError("every value of std must be above 0")
        return self


class CalibrationSection(Section):
    """Where the calibration images come from."""

    method: str = Field(
        default="zeroq",
        min_length=1,
        description="How images are made: zeroq, fast, genie, fractal, ... (`zsq methods` lists them all); auto chooses from measured evidence; "
        "bn-analytic makes none.",
    )
    time_limit: float | None = Field(
        default=None,
        gt=0,
        description="With method auto: seconds that making the images may take, on one processor core.",
    )
    images: int = Field(default=256, gt=0, description="Number of images.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the images; run.seed if it is not given.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of the method that differ from its published defaults."
    )
    device: str | None = Field(
        default=None, description="Where images are made: cpu, cuda, cuda:1; by default cuda where there is one."
    )
    also: list[str] = Field(
        default_factory=list,
        description="Further networks with the same input and classes that the images are to fit as well, for methods that look at "
        "several (mixmix): files or names as in model.source, with the same preprocessing.",
    )
    workers: int = Field(
        default=1, ge=1, description="Processes that make images at the same time, each with a share of the threads."
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="What convolutions read while images are made; bfloat16 is meant for GPUs, auto takes it where there is one.",
    )
    compile: bool = Field(
        default=False,
        description="Make one program of the network's forward pass with torch.compile while images are made; needs a C++ compiler, on a GPU Triton.",
    )
    holdout: int = Field(
        default=64,
        ge=0,
        description="Further images that nothing is calibrated on, for an estimate of agreement where there are no labelled data.",
    )
    set: str | None = Field(
        default=None,
        description="Folder of a finished calibration set to use instead of making one; its last part is held out.",
    )


class GatesSection(Section):
    """Limits that the engine has to keep; the exit code is 1 when one of them is missed. Shares are written 0 to 1."""

    min_agreement: Share | None = Field(
        default=None, description="Least top-1 agreement with the fake-quant reference, 0.995."
    )
    min_float_agreement: Share | None = Field(default=None, description="Least top-1 agreement with the float network.")
    max_accuracy_drop: Share | None = Field(
        default=None, description="Largest loss of accuracy on labelled data; 0.01 is one point."
    )
    min_speedup: float | None = Field(default=None, gt=0, description="Least speed-up over fp32; 2 is twice as fast.")
    min_within_2_lsb: Share | None = Field(
        default=None, description="Least share of outputs within 2 LSB of the fake-quant reference."
    )
    min_integer_macs: Share | None = Field(
        default=None, description="Least share of multiply-accumulates in integer kernels."
    )
    min_integer_equal: Share | None = Field(
        default=None, description="Least share of outputs that equal exact integer arithmetic."
    )
    min_sqnr_db: float | None = Field(default=None, description="Least SQNR of the outputs against float, in dB.")
    max_latency_ms: float | None = Field(
        default=None, gt=0, description="Largest median latency at batch 1, in milliseconds."
    )
    max_engine_bytes: int | None = Field(default=None, gt=0, description="Largest size of the engine file, in bytes.")


class VerificationSection(Section):
    """What the engine is measured on, and what it has to reach."""

    eval_data: str | None = Field(
        default=None,
        description="Labelled images: an .npz file with x and y, or an image folder. Used to evaluate, for nothing else.",
    )
    limit: int | None = Field(default=None, gt=0, description="Evaluate on at most this many images, spread evenly.")
    resize: bool = Field(default=False, description="Scale evaluation images of another size to the network's input.")
    gates: GatesSection = Field(default=GatesSection(), description="Limits that decide the exit code.")


class RunSection(Section):
    """Things that are about the run and not about the result."""

    threads: int | None = Field(
        default=None, gt=0, description="Threads of the engine that is measured; 1 if it is not given."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    output: str | None = Field(default=None, description="Output folder.")
