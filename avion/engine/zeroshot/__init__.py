"""Zero-shot: what a trained model knows without further training.

`classes` turns names of classes into embeddings, and a video into scores.
"""

from .classes import class_embeddings, classify_video

__all__ = ["class_embeddings", "classify_video"]
