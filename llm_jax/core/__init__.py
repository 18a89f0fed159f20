"""What everything else stands on: contracts, config, plug-ins by name, trees by path, parameters,
weighted means, the training state, files that are written whole, and names of scopes.
"""
