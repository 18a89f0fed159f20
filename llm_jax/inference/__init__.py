"""A model opened for use: predictions, vectors, texts."""
