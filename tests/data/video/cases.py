"""The small files that public reports describe, and what is right about each."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "fixtures" / "videos"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NAMES = sorted(EXPECTED)
# Their containers state no true times, so that `seconds` there is what a demuxer guesses.
UNTIMED = ("x264.avi", "fromavi.mp4", "cover_first.mp4")
