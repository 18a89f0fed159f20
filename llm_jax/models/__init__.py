"""Architectures: each module has `Model` and `VARIANTS`, published shapes by name."""
