"""llm_jax: raw text to a trained, adapted, checked and usable Transformer, in JAX and Flax."""

__version__ = '0.1.0'
