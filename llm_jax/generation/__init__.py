"""Generation: tokens after tokens, with a cache."""
