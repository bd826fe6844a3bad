"""Mamba as a video temporal adapter: video-language models, training and evaluation."""

__version__ = "0.1.0"
