"""EgoSchema, zero-shot: the option whose text is nearest to the video, for any number of frames.

`evaluate` is the run, `results` what it keeps of finished videos, `answers` what it writes and sends in the end.
"""

from .evaluate import run_egoschema

__all__ = ["run_egoschema"]
