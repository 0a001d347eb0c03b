"""One model in two forms: an ONNX graph with batch normalization kept, and its differentiable torch twin.

:func:`load_model` reads networks, :class:`Model` holds one, :func:`fold` makes the deployable graph, :class:`Twin` computes a
graph in torch.
"""

from zsq_deploy.model.fold import BatchNorm, Folded, batch_norms, fold
from zsq_deploy.model.graph import Graph, TensorSpec
from zsq_deploy.model.macs import node_macs
from zsq_deploy.model.model import Model, load_model
from zsq_deploy.model.preprocess import Preprocess
from zsq_deploy.model.twin import Twin

__all__ = [
    "BatchNorm",
    "Folded",
    "Graph",
    "Model",
    "Preprocess",
    "TensorSpec",
    "Twin",
    "batch_norms",
    "fold",
    "load_model",
    "node_macs",
]
