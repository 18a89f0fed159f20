"""Adapters: what is trained beside a frozen base; a module here defines `Adapter`."""
