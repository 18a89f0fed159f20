"""Modes: what `--mode` names; a module here defines its flags and `run`."""
