"""The documentation that ships with the package."""
