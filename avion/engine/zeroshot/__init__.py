"""Zero-shot evaluation: what a trained model can do without further training.

`classes` turns names of classes into embeddings, and a video into scores. `evaluate` does the run of
`main_zeroshot.py`, `benchmarks` says what each benchmark reads and how it is scored, and `feature_log` keeps the
features of finished batches.
"""

from .classes import class_embeddings, classify_video

__all__ = ["class_embeddings", "classify_video"]
