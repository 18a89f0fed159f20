"""What everything else stands on: the contracts, the config, plug-ins by name, trees by path,
weighted means, the training state.
"""
