"""Search videos by a sentence, an image or a clip: an index of windows, exact ranking, moments, a local page."""
