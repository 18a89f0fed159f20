"""Tokenizers: each module has `Tokenizer`, text to ids and back, with the special ids known."""
