"""From documents to batches: sources, tokenizers, the token cache, packing and the example
pipeline.
"""
