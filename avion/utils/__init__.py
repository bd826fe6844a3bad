"""AVION's import paths, and small helpers for scripts that were written for AVION. Nothing in this project imports
them.
"""
