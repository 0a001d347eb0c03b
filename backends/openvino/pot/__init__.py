"""POT, OpenVINO's Post-training Optimization Tool (last release: 2023.3), in an interpreter of its own."""

from typing import Any

__all__ = ["design_pot"]


def __getattr__(name: str) -> Any:
    """The route needs OpenVINO; environments and configurations do without."""
    if name == "design_pot":
        from zsq_deploy.backends.openvino.pot.route import design_pot

        return design_pot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
