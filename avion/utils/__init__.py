"""AVION's import paths: what lives elsewhere is handed on, and small helpers for scripts that were written for AVION.
Nothing in this project imports them."""
