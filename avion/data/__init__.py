"""Data: annotation readers, video decoding, clips, transforms, tokens, the demo dataset."""
