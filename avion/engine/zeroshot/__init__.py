"""Zero-shot: what a trained model knows without further training.

`classes` turns names of classes into embeddings, and a video into scores. `evaluate` has the run of `main_zeroshot.py`,
`benchmarks` what each benchmark reads and how it is judged, `feature_log` what a run keeps of finished batches.
"""

from .classes import class_embeddings, classify_video

__all__ = ["class_embeddings", "classify_video"]
