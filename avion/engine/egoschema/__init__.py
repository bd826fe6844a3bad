"""EgoSchema, zero-shot: the answer is the option whose text is nearest to the video, for any number of frames.

`evaluate` does the run, `results` keeps the scores of finished videos, and `answers` writes and sends the answers in
the end.
"""
