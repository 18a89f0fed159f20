"""The Linen layers that models are made of, their heads, and the two ends of a language model."""
