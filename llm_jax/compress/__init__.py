"""Methods that make a model smaller (`core.contracts.Compression`), one file each."""
