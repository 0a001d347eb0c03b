"""The report: JSON first, HTML drawn from it."""
