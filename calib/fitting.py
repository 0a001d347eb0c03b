"""Which methods can make inputs for a network, so that an error names what works and nothing else."""

from __future__ import annotations

from zsq_deploy.calib.baselines import image_shape
from zsq_deploy.calib.catalogue import facts
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.model import Model

__all__ = ["OWN_INPUTS", "advice", "fitting"]

OWN_INPUTS = "hand over inputs of your own: CalibrationSet.from_arrays({name: array}, CalibrationManifest.of(model, method='real')).save(FOLDER), then --calibration FOLDER"
"""What is left where no method can make inputs."""


def fitting(model: Model) -> tuple[str, ...]:
    """Methods that can make inputs for this network, in the order of :data:`~zsq_deploy.calib.methods.METHODS`.

    ``ones`` fits everything and is left out: nobody should be advised to use it.
    """
    floats = all(spec.dtype.kind == "f" for spec in model.inputs)
    pictures = floats and all(image_shape(spec) is not None for spec in model.inputs)
    learns = floats and len(model.inputs) == 1 and bool(model.batch_norms())
    flat = len(model.inputs[0].shape) != 4
    classes = find_labels(model.graph, model.outputs) is not None
    found = []
    for name, method in METHODS.items():
        if not method.images or name == "ones":
            continue
        if method.run is None:
            fits = pictures if name == "fractal" else floats
        else:
            fits = learns and not (method.pictures and flat) and (classes or not facts(method).needs_labels)
        if fits:
            found.append(name)
    return tuple(found)


def advice(model: Model) -> str:
    """What to do where a method does not fit this network."""
    names = fitting(model)
    if not names:
        return OWN_INPUTS
    return f"methods that fit this network: {', '.join(names)} (--method NAME)"
