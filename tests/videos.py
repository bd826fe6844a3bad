"""Real H.264 files for the tests, in which every frame says which one it is.

A frame carries its index as a barcode: a 4 x 4 grid of blocks over the whole picture, twelve of them one bit
each (bright or dark), the other four a checksum, so that a blend of two frames or a smeared one does not
read as a third. A small moving texture lies on top, which gives the encoder motion to predict (without it
x264 spends nothing on the frames between). `read_barcode` survives compression, colour conversion and resizing.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GRID = 4
INDEX_BITS = 12
MAX_INDEX = 2**INDEX_BITS - 1


def _bits(index: int) -> np.ndarray:
    """Sixteen bits: twelve of the index, four of a checksum. -> (4, 4) bool"""
    if not 0 <= index <= MAX_INDEX:
        raise ValueError(f"a barcode holds 0 to {MAX_INDEX}, not {index}")
    check = (index ^ (index >> 4) ^ (index >> 8) ^ 0b1010) & 0xF
    word = index | (check << INDEX_BITS)
    return np.array([(word >> i) & 1 for i in range(GRID * GRID)], dtype=bool).reshape(GRID, GRID)


def barcode_frame(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """The picture of frame `index`. -> (height, width, 3) uint8"""
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    plane = np.where(_bits(index)[rows[:, None], columns[None, :]], 200.0, 50.0)  # (H, W)
    y, x = np.mgrid[0:height, 0:width]
    texture = 20.0 * np.sin((x + 2 * index) / 5.0) * np.cos((y - index) / 7.0)
    tint = np.array([12.0, 0.0, -12.0])
    return np.clip(plane[:, :, None] + texture[:, :, None] + tint, 0, 255).astype(np.uint8)


def read_barcode(frame: np.ndarray) -> int:
    """The index in a decoded frame (H, W, 3), or -1 if what is there is no barcode."""
    height, width = frame.shape[:2]
    grey = frame.astype(np.float64).mean(axis=2)
    word = 0
    for i in range(GRID * GRID):
        row, column = divmod(i, GRID)
        top, bottom = row * height // GRID, (row + 1) * height // GRID
        left, right = column * width // GRID, (column + 1) * width // GRID
        dy, dx = (bottom - top) // 4, (right - left) // 4
        block = grey[top + dy : bottom - dy, left + dx : right - dx]
        word |= int(block.mean() > 125.0) << i
    index = word & MAX_INDEX
    return index if np.array_equal(_bits(index).reshape(-1), [(word >> i) & 1 for i in range(16)]) else -1


def write_video(
    path: str | Path,
    num_frames: int,
    *,
    first: int = 0,
    fps: Fraction | int = 30,
    width: int = 96,
    height: int = 64,
    gop: int | None = None,
    bframes: int | None = None,
    scenecut: bool = True,
    with_audio: bool = False,
    rotation: int = 0,
    x264: str = "",
    numbers: int = sys.maxsize,
    codec: str = "libx264",
) -> Path:
    """Write frames `first`, `first + 1`, … as H.264 with x264's defaults (GOP 250, three B-frames, CRF 23)
    wherever nothing else is asked for. x264: further settings, as x264 writes them ("open-gop=1:keyint=30").
    rotation: degrees by which players turn the picture. numbers: after so many frames the barcodes begin again.
    codec: another encoder, as FFmpeg names it, which takes none of the settings. -> path"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mbtree beside B-frames gives another file each time.
    options = {"crf": "23", "preset": "medium", "mbtree": "0"}
    if gop is not None:
        options["g"] = str(gop)
    if bframes is not None:
        options["bf"] = str(bframes)
    if not scenecut:
        options["sc_threshold"] = "0"
    if x264:
        options["x264-params"] = x264
    with av.open(str(path), "w") as container:
        options = options if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        stream.codec_context.thread_count = 1  # the number of threads changes what x264 writes
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=16000, layout="mono") if with_audio else None
        for i in range(num_frames):
            picture = av.VideoFrame.from_ndarray(barcode_frame((first + i) % numbers, height, width), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if audio is not None:
            _write_silence(container, audio, seconds=num_frames / float(fps))
    return path


def write_audio_only(path: str | Path, seconds: float = 1.0) -> Path:
    """An .mp4 with a sound track and no picture."""
    with av.open(str(path), "w", format="mp4") as container:
        _write_silence(container, container.add_stream("aac", rate=16000, layout="mono"), seconds)
    return Path(path)


def _write_silence(container, stream, seconds: float) -> None:
    for start in range(0, max(1024, int(seconds * 16000)), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
