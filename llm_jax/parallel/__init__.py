"""Devices: the mesh and its rules, sharded weights, several hosts, what chips can do, machines by
name.
"""
