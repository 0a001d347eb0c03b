"""What can be refused before any image is made: tools that are not there, and layers that the network does not have."""

from __future__ import annotations

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.openvino.nncf_route import prepare
from zsq_deploy.backends.openvino.nncf_scope import ignored_operators
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.pot import environment
from zsq_deploy.backends.openvino.pot.config import read_pot_config
from zsq_deploy.backends.openvino.quiet import load_nncf
from zsq_deploy.model.graph import Graph

__all__ = ["check_options"]


def check_options(graph: Graph, target: Target, options: BuildOptions) -> None:
    """Refuse what would fail later for a reason that is known now.

    Args:
        graph: The folded float graph.
        target: The target.
        options: What was asked for.

    Raises:
        UsageError: A layer, type or pattern that the network does not have, or a POT configuration that is none.
        EngineError: NNCF or POT is not there.
        StaleArtifactError: POT's environment is of another version.
    """
    del target
    told = options.nncf
    if options.weight_only is not None or options.quantizer == "nncf":
        load_nncf()
    if options.quantizer in ("auto", "nncf") and (told.ignored_names or told.ignored_types or told.ignored_patterns):
        ignored_operators(
            prepare(graph),
            graph,
            names=told.ignored_names,
            types=told.ignored_types,
            patterns=told.ignored_patterns,
            op_types=options.op_types,
        )
    if options.quantizer == "pot" and options.weight_only is None:
        if options.pot.config_path is not None:
            read_pot_config(options.pot.config_path)
        environment.check("pot")
