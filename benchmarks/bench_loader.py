"""Loading training clips: this project's way against AVION's, same clips, one process, one core.

    python benchmarks/bench_loader.py [--clips 24] [--rounds 3] [--width 512 --height 288] [--gop 250]

AVION's way, written here after its description: stock decord, frames to float32 one by one, torchvision's
RandomResizedCrop on floats, normalisation, all in the worker. Ours: `VideoStore` and `TrainTransform`, fused
(uint8 until the device) and plain, with each decoder that is installed. The videos are 15 s chunks with x264's
default settings, of a moving textured picture; both sides read the same spans and draw their crops from the same
distribution. Rounds alternate between the sides; the best round of each counts. Times are of the CPU, all threads
together: with a worker per core, that is what limits. Ratios are AVION's time over ours.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import decord
import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.constants import NORM_STYLES
from avion.data.clip_dataset import read_transformed
from avion.data.narrations import Narration
from avion.data.transforms import TrainTransform
from avion.data.video import VideoStore, uniform_frame_ids

CHUNK_S, FPS, VIDEOS = 15, 30, 3
CASES = ((4, 1.0), (16, 1.0), (16, 3.0))  # frames, seconds


def smooth_noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A picture with the spectrum of natural ones (amplitude falls as 1/frequency). (height, width), unit variance"""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    picture = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(height, width)), s=(height, width))
    return (picture - picture.mean()) / picture.std()


def write_chunk(path: Path, height: int, width: int, gop: int, seed: int) -> None:
    """15 s in which a camera wanders over a textured scene, with sensor noise."""
    rng = np.random.default_rng(seed)
    scene = np.stack([smooth_noise(2 * height, 2 * width, rng) * 15 for _ in range(3)], axis=-1)
    scene += 128 + 40 * smooth_noise(2 * height, 2 * width, rng)[:, :, None]
    position, speed = np.array([height / 2, width / 2]), np.zeros(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(CHUNK_S * FPS):
            speed += rng.normal(0, 0.6, 2) - 0.05 * speed - 0.002 * (position - (height / 2, width / 2))
            position = np.clip(position + speed, 0, (height - 1, width - 1))
            top, left = position.astype(int)
            picture = scene[top : top + height, left : left + width] + rng.normal(0, 3, (height, width, 3))
            picture = np.clip(picture, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def avions_way(root: Path, crop: int) -> Callable:
    """(video, start, seconds, frames, seed) -> (3, T, crop, crop) float32"""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in NORM_STYLES["openai"])
    transform = RandomResizedCrop(crop, scale=(0.5, 1.0), antialias=True)

    def load(video: str, start: float, seconds: float, frames: int, seed: int) -> torch.Tensor:
        reader = decord.VideoReader(str(root / f"{video}.mp4" / "0.mp4"), num_threads=1)
        fps = reader.get_avg_fps()
        first, last = round(start * fps), round((start + seconds) * fps)
        ids = uniform_frame_ids(first, last, frames, np.random.default_rng(seed))
        decoded = reader.get_batch(ids.tolist()).asnumpy()
        clip = torch.stack([torch.tensor(frame, dtype=torch.float32) for frame in decoded])  # (T, H, W, 3)
        return (transform(clip.permute(3, 0, 1, 2)) - mean) / std

    return load


def our_way(root: Path, crop: int, decoder: str, fused: bool) -> Callable:
    store, transform = VideoStore(root, decoder=decoder), TrainTransform(crop, fused=fused)

    def load(video: str, start: float, seconds: float, frames: int, seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        row = Narration(video, start, start + seconds, ("",), None)
        return read_transformed(store, row, frames, transform, rng, jitter=True)[0]

    return load


def milliseconds_per_clip(load: Callable, spans: list[tuple]) -> float:
    start = time.process_time()
    for span in spans:
        load(*span)
    return 1000 * (time.process_time() - start) / len(spans)


def compare(sides: dict[str, Callable], frames: int, seconds: float, clips: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    spans = [(f"video{i % VIDEOS}", float(rng.uniform(0, CHUNK_S - seconds)), seconds, frames, i) for i in range(clips)]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for load in sides.values():
        load(*spans[0])  # warm-up
    for _ in range(rounds):
        for name, load in sides.items():
            times[name].append(milliseconds_per_clip(load, spans))
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--gop", type=int, default=250, help="frames between keyframes (x264's default: 250)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(VIDEOS):
            write_chunk(root / f"video{i}.mp4" / "0.mp4", args.height, args.width, args.gop, seed=i)
        size = statistics.mean(path.stat().st_size for path in root.rglob("0.mp4"))
        print(f"{args.width} x {args.height}, 15 s chunks of {size / 1e6:.2f} MB, a keyframe every {args.gop} frames")
        sides = {
            "AVION's way": avions_way(root, args.crop),
            "pyav, fused": our_way(root, args.crop, "pyav", fused=True),
            "pyav, plain": our_way(root, args.crop, "pyav", fused=False),
            "decord, fused": our_way(root, args.crop, "decord", fused=True),
        }
        for frames, seconds in CASES:
            result = compare(sides, frames, seconds, args.clips, args.rounds)
            base = result["AVION's way"]
            print(f"{frames} frames of {seconds:g} s")
            for name, value in result.items():
                print(f"  {name:14s} {value:7.1f} CPU ms per clip   x {base / value:.2f}")


if __name__ == "__main__":
    main()
