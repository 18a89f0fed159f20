"""Kernels and tables in fewer bytes than an array has: weight forms (`core.contracts.WeightForm`),
one file each, and the schemes that make them (`core.contracts.Scheme`).
"""
