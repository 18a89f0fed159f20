"""Hooks: what a training run does every so many steps; a module here defines `Hook`."""
