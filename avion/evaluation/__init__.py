"""Evaluation: arrays in, figures out. No files, no process group."""
