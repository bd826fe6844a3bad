"""A small dataset with its packet index."""

import pytest

from avion.data.video import index_videos
from tests.videos import write_video


@pytest.fixture
def dataset(tmp_path):
    """Chunks of two videos at 10 frames per second, indexed."""
    root = tmp_path / "root"
    for video in ("a", "b"):
        for k in range(2):
            write_video(root / f"{video}.mp4/{15 * k}.mp4", 150, first=150 * k, fps=10, gop=20)
    index_videos(root)
    return root
