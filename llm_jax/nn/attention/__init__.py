"""Attention: the choice of an implementation, and one module for each."""
