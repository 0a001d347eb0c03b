"""zsq-deploy: from a trained network to a verified integer engine, without any training data."""

__version__ = "0.1.0"
