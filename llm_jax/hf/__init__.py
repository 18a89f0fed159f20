"""Hugging Face's folders, both ways."""
