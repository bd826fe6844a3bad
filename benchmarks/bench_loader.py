"""Loading training clips: this project's way against AVION's and other readers, in one process, on one core.

    python benchmarks/bench_loader.py [--clips 24] [--rounds 3] [--videos FILE ...] [--reads 20000]

The same pictures are encoded twice: as chunks of 15 s with x264's default settings, which AVION's recipe makes, and as
tools/prepare_videos.py encodes by default. AVION's way, written here after its description, reads the former: stock
decord, frames to float32 one by one, torchvision's RandomResizedCrop on floats, normalisation, all in the worker. Our
way is `VideoStore` with `--fused-decode-crop` (uint8 until the device), with and without the packet index. The other
readers decode the same frames and crop them as uint8: decord, torchcodec (exact and approximate, where it is
installed), and PyAV as its documentation shows it (seek, decode, convert).

All sides read the same spans and draw their crops from the same distribution. Rounds alternate between the sides, and
the best round of each counts. The times are CPU times of all threads together, because with a worker per core the CPU
is the limit. Ratios are AVION's time over the time of the side. The benchmark then measures clips per second with two
processes over those with one, a whole video of an hour against a chunk, and how much memory many reads take.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.constants import NORM_STYLES
from avion.data.clip_dataset import read_transformed
from avion.data.narrations import Narration
from avion.data.transforms import TrainTransform
from avion.data.video import VideoError, VideoStore, index_videos, open_video, uniform_frame_ids

CHUNK_S, VIDEOS = 15, 3
CASES = ((4, 1.0), (16, 1.0), (16, 3.0))  # frames, seconds
HOUR_S = 3600


def smooth_noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a picture (height, width) of unit variance with the spectrum of natural ones: the amplitude falls as
    1/frequency.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    picture = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(height, width)), s=(height, width))
    return (picture - picture.mean()) / picture.std()


def avions_way(root: Path, crop: int) -> Callable:
    """Return a function (video, start, seconds, frames, seed) → (3, T, crop, crop) float32."""
    import decord

    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in NORM_STYLES["openai"])
    transform = RandomResizedCrop(crop, scale=(0.5, 1.0), antialias=True)

    def load(video: str, start: float, seconds: float, frames: int, seed: int) -> torch.Tensor:
        reader = decord.VideoReader(str(root / f"{video}.mp4" / "0.mp4"), num_threads=1)
        ids = frame_ids(reader.get_avg_fps(), start, seconds, frames, seed)
        decoded = reader.get_batch(ids.tolist()).asnumpy()
        clip = torch.stack([torch.tensor(frame, dtype=torch.float32) for frame in decoded])  # (T, H, W, 3)
        return (transform(clip.permute(3, 0, 1, 2)) - mean) / std

    return load


def our_way(root: Path, crop: int, decoder: str, fused: bool, index: str | None = "auto") -> Callable:
    store = VideoStore(root, decoder=decoder, index=index)
    transform = TrainTransform(crop, fused=fused)

    def load(video: str, start: float, seconds: float, frames: int, seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        row = Narration(video, start, start + seconds, ("",), None)
        return read_transformed(store, row, frames, transform, rng, jitter=True)[0]

    return load


def peer(root: Path, crop: int, read: Callable) -> Callable:
    """Return a way of loading that reads with `read`: (path, numbers of the frames) → (T, H, W, 3) uint8."""
    transform = TrainTransform(crop, fused=True)

    def load(video: str, start: float, seconds: float, frames: int, seed: int) -> torch.Tensor:
        path = str(root / f"{video}.mp4" / "0.mp4")
        decoded = read(path, lambda fps: frame_ids(fps, start, seconds, frames, seed))
        return transform(np.ascontiguousarray(decoded), np.random.default_rng(seed))

    return load


def peers(example: Path) -> dict[str, Callable]:
    """Return the readers that are installed and can open a file such as `example`."""
    found: dict[str, Callable] = {"PyAV, plainly used": _read_with_pyav}
    try:
        import decord

        def with_decord(path: str, ids_of: Callable) -> np.ndarray:
            reader = decord.VideoReader(path, num_threads=1)
            return reader.get_batch(ids_of(reader.get_avg_fps()).tolist()).asnumpy()

        found["decord"] = with_decord
    except ImportError:
        pass
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(str(example))  # which looks for FFmpeg's libraries
    except Exception as error:  # a RuntimeError where it finds none
        print(f"without torchcodec ({str(error).splitlines()[0]})")
        return found
    for mode in ("exact", "approximate"):

        def with_torchcodec(path: str, ids_of: Callable, mode: str = mode) -> np.ndarray:
            reader = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=1, dimension_order="NHWC")
            return reader.get_frames_at(ids_of(reader.metadata.average_fps).tolist()).data.numpy()

        found[f"torchcodec, {mode}"] = with_torchcodec
    return found


def _read_with_pyav(path: str, ids_of: Callable) -> np.ndarray:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        ids = ids_of(float(stream.average_rate)).tolist()
        tick = 1 / (stream.average_rate * stream.time_base)
        container.seek(int(ids[0] * tick), stream=stream)
        frames = {}
        for frame in container.decode(stream):
            number = round(frame.pts / tick)
            if number in ids:
                frames[number] = frame.to_ndarray(format="rgb24")
            if number >= ids[-1]:
                break
    return np.stack([frames[i] for i in ids])


def frame_ids(fps: float, start: float, seconds: float, frames: int, seed: int) -> np.ndarray:
    first, last = round(start * fps), round((start + seconds) * fps)
    ids = uniform_frame_ids(first, last, frames, np.random.default_rng(seed))
    return np.minimum(ids, round(CHUNK_S * fps) - 1)


def milliseconds_per_clip(load: Callable, spans: list[tuple]) -> float:
    start = time.process_time()
    for span in spans:
        load(*span)
    return 1000 * (time.process_time() - start) / len(spans)


def compare(sides: dict[str, Callable], frames: int, seconds: float, clips: int, rounds: int) -> dict[str, float]:
    """Return the CPU time in milliseconds per clip of every side."""
    spans = spans_of(clips, frames, seconds)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for load in sides.values():
        load(*spans[0])  # warm-up
    for _ in range(rounds):
        for name, load in sides.items():
            times[name].append(milliseconds_per_clip(load, spans))
    return {name: min(values) for name, values in times.items()}


def spans_of(clips: int, frames: int, seconds: float, length: float = CHUNK_S) -> list[tuple]:
    rng = np.random.default_rng(0)
    return [(f"video{i % VIDEOS}", float(rng.uniform(0, length - seconds)), seconds, frames, i) for i in range(clips)]


def processes(load: Callable, count: int, seconds: float) -> tuple[float, float]:
    """Return the speed of `count` processes together: clips per second, and clips per second of CPU time on `count`
    cores, which other programs on the machine do not change.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work() -> None:
        torch.set_num_threads(1)
        spans, done, start, began = spans_of(64, 4, 1.0), 0, time.monotonic(), time.process_time()
        while time.monotonic() - start < seconds:
            load(*spans[done % len(spans)])
            done += 1
        results.put((done / (time.monotonic() - start), done / (time.process_time() - began)))

    running = [context.Process(target=work) for _ in range(count)]
    for process in running:
        process.start()
    rates = [results.get() for _ in running]
    for process in running:
        process.join()
    return sum(rate for rate, _ in rates), sum(rate for _, rate in rates)


def repeat_chunk(chunk: Path, target: Path, seconds: int) -> float:
    """Write one file with the packets of `chunk`, repeated until the file has this length. Nothing is encoded.

    Returns:
        The length of the chunk in seconds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w") as sink:
        out, offset = None, 0
        while True:
            with av.open(str(chunk)) as source:
                stream = source.streams.video[0]
                out = out or sink.add_stream_from_template(stream)
                length = Fraction(stream.frames) / stream.average_rate
                for packet in source.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, out
                        sink.mux(packet)
                offset += round(length / stream.time_base)
                if offset * stream.time_base >= seconds:
                    return float(length)


def an_hour(root: Path, folder: Path, crop: int, clips: int, rounds: int) -> float:
    """Return the time of clips of a whole video of an hour over that of clips of a chunk of 15 s, both indexed."""
    lengths = {}
    for i in range(VIDEOS):
        lengths[f"video{i}"] = repeat_chunk(root / f"video{i}.mp4" / "0.mp4", folder / f"video{i}.mp4", HOUR_S)
    index_videos(folder)
    long, short = our_way(folder, crop, "pyav", True), our_way(root, crop, "pyav", True)
    times: dict[str, list[float]] = {"long": [], "short": []}
    spans = {"short": spans_of(clips, 4, 1.0)}
    # The same places of the same chunk are read, so that only the file around them differs.
    spans["long"] = [(v, t + lengths[v] * (21 * i % 210), s, n, k) for i, (v, t, s, n, k) in enumerate(spans["short"])]
    for _ in range(rounds + 1):
        for name, load in (("long", long), ("short", short)):
            times[name].append(milliseconds_per_clip(load, spans[name]))
    return min(times["long"][1:]) / min(times["short"][1:])


def growth(load: Callable, reads: int) -> float:
    """Return by how many MB the memory in use grows over so many reads, after the first hundred."""
    spans = spans_of(100, 4, 1.0)
    for span in spans:
        load(*span)
    before = _resident()
    for i in range(reads):
        load(*spans[i % len(spans)])
    return _resident() - before


def _resident() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # the most that it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def a_video(path: str) -> str:
    """For argparse: a file that can be opened."""
    try:
        open_video(path).close()
    except VideoError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def write_videos(folder: Path, files: list[str], height: int, width: int) -> tuple[Path, Path]:
    """Write the same pictures in both encodings, and return the folder of x264's defaults and the folder of ours."""
    from avion.data.video.prepare_encode import Encoding
    from benchmarks.bench_encoding import Default, material, write

    roots = folder / "default", folder / "prepared"
    for i, (name, rate, shots) in enumerate(material(files, height, width, CHUNK_S)[:VIDEOS]):
        print(f"{name}: {shots[0].width} x {shots[0].height}, {float(rate):g} frames per second")
        for root, encoding in zip(roots, (Default(), Encoding()), strict=True):
            write(root / f"video{i}.mp4" / "0.mp4", shots, rate, encoding)
    return roots


def bytes_of(root: Path) -> float:
    return statistics.mean(path.stat().st_size for path in root.rglob("0.mp4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--videos", nargs=VIDEOS, type=a_video, default=[], metavar="FILE", help="take the pictures from these files"
    )
    parser.add_argument("--width", type=int, default=512, help="of the drawn pictures; that of real ones is their own")
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--reads", type=int, default=500, help="reads over which the memory is watched")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        default, prepared = write_videos(folder, args.videos, args.height, args.width)
        plain, small = bytes_of(default), bytes_of(prepared)
        print(
            f"chunks of {CHUNK_S} s: {plain / 1e6:.2f} MB as x264 encodes by default, "
            f"{small / 1e6:.2f} MB prepared (x {small / plain:.2f})"
        )
        for root in (default, prepared):
            made = index_videos(root)
            print(f"index of {root.name}: {made.path.stat().st_size / made.frames:.1f} bytes per frame")
        sides = {
            "AVION's way": avions_way(default, args.crop),
            "ours, prepared": our_way(prepared, args.crop, "pyav", True),
            "ours, AVION's chunks": our_way(default, args.crop, "pyav", True),
            "ours, without index": our_way(default, args.crop, "pyav", True, index=None),
            "ours, plain path": our_way(default, args.crop, "pyav", False, index=None),
        }
        for reader, read in peers(default / "video0.mp4" / "0.mp4").items():
            sides[f"{reader}"] = peer(default, args.crop, read)
            sides[f"{reader}, prepared"] = peer(prepared, args.crop, read)
        for frames, seconds in CASES:
            result = compare(sides, frames, seconds, args.clips, args.rounds)
            base = result["AVION's way"]
            print(f"{frames} frames of {seconds:g} s")
            for side, value in result.items():
                print(f"  {side:34s} {value:7.1f} CPU ms per clip   x {base / value:.2f}", flush=True)
        load = sides["ours, prepared"]
        (one, one_cpu), (two, two_cpu) = (processes(load, count, 4.0) for count in (1, 2))
        print(f"clips per second: {one:.0f} with one process, {two:.0f} with two (x {two / one:.2f})")
        print(f"clips per second of CPU time: {one_cpu:.0f} and {two_cpu:.0f} (x {two_cpu / one_cpu:.2f})")
        ratio = an_hour(prepared, folder / "hour", args.crop, args.clips, args.rounds)
        print(f"a clip of a whole video of an hour takes x {ratio:.2f} of one of a chunk")
        shutil.rmtree(folder / "hour")
        print(f"{args.reads} reads grow the memory by {growth(load, args.reads):.1f} MB")


if __name__ == "__main__":
    main()
