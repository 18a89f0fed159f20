"""Sources: each module has `Source`, a sequence of records (dictionaries) read by index."""
