"""Evaluators: from batches of the validation set to a dictionary of numbers."""
