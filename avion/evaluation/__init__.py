"""Evaluation: functions from arrays to metrics, without files and without process groups."""
