"""One short file a paper."""
