"""POT, OpenVINO's Post-training Optimization Tool (last release: 2023.3), in an interpreter of its own."""
