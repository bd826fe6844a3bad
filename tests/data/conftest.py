"""Videos that the data tests share: written once, read-only for the tests."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from avion.data.demo import DemoPaths, ensure_demo_dataset
from tests.data.demo_case import SMALL
from tests.videos import write_video

LAST_CHUNK = 40  # frames of the last chunk of `chunked.video`


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Single files: `gop250` (x264's defaults, 300 frames, two keyframes), `short_gop` (keyframe every 12, no
    B-frames), `ntsc` (30000/1001 frames per second), `portrait` (of another size, with a sound track)."""
    folder = tmp_path_factory.mktemp("videos")
    return SimpleNamespace(
        gop250=write_video(folder / "gop250.mp4", 300, scenecut=False),
        short_gop=write_video(folder / "short_gop.mp4", 90, gop=12, bframes=0),
        ntsc=write_video(folder / "ntsc.mp4", 90, fps=Fraction(30000, 1001)),
        portrait=write_video(folder / "portrait.mp4", 60, width=64, height=112, with_audio=True),
    )


@pytest.fixture(scope="session")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One video of 10 frames per second in chunks of 15 s (150 frames), 340 frames long, barcodes counted over the
    whole video. In the three layouts below `root`, in EPIC-KITCHENS' folders, and as Video Mamba Suite has those."""
    root = tmp_path_factory.mktemp("chunked")
    first = [write_video(root / f"avion/abc.mp4/{15 * k}.mp4", n, first=150 * k, fps=10) for k, n in _chunks()]
    for k, source in enumerate(first):
        for copy in (f"vms/abc/{k:04d}.mp4", f"ek/P01/P01_01.MP4/{15 * k}.MP4", f"ek_vms/P01_01/{k:04d}.mp4"):
            _link(source, root / copy)
    write_video(root / "whole/abc.mp4", 340, fps=10)
    return SimpleNamespace(root=root, **{name: root / name for name in ("avion", "vms", "ek", "ek_vms", "whole")})


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """The demo dataset at SMALL size, made by one process."""
    return ensure_demo_dataset(tmp_path_factory.mktemp("demo") / "demo", seed=7, size=SMALL, workers=1)


def _chunks() -> list[tuple[int, int]]:
    return [(0, 150), (1, 150), (2, LAST_CHUNK)]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.hardlink_to(source)
