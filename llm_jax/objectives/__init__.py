"""Objectives: each module has `Objective`, which lays out rows, makes examples of them, and gives
their loss.
"""
