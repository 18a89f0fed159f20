"""Sources of documents: each module has `Source`, a sequence of documents read by index."""
