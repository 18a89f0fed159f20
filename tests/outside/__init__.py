"""A plug-in of each kind from outside of the package, each in one file, found by its dotted name.

`config.py` puts them together; `test_outside.py` runs what comes of it, end to end.
"""
