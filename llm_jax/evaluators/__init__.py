"""Evaluators: from a validation set to a dictionary of numbers and a report.

Each module defines `Evaluator(**options)`, see `core.contracts`; a config names them in
`evaluators`, an objective those that it wants by default.
"""
