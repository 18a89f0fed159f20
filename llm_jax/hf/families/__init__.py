"""Hugging Face's families of models, one file each."""
