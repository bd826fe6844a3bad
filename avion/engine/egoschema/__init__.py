"""EgoSchema, zero-shot: the answer is the option whose text is nearest to the video, for any number of frames.

`evaluate` has the run, `results` what a run keeps of finished videos, `answers` what a run writes and sends in the end.
"""
