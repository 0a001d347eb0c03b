"""The command line, `zsq`."""
