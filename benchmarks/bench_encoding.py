"""Bytes against reading time: what x264's settings cost where clips are read at random places.

    python benchmarks/bench_encoding.py [--videos FILE ...] [--plot docs/images/encoding.png]

Every setting encodes the same pictures, 288 pixels high. Clips of 4 frames of 1 s, 16 of 1 s and 16 of 3 s are then
read from the files: positioned reads of the packets that are needed, a bare decoder, cropping and scaling to 224 x 224.
The benchmark prints the bytes relative to x264's default (CRF 23, preset medium), the CPU time per clip, and how many
times faster this is than AVION's way (decord, crops of floats) on x264's default. The PSNR of the pictures is computed
on luma against the encoder's input, so that no setting looks better because it shows less. Both ways of reading
alternate.

--videos names real files from which the pictures are taken; one that is too short is played back and forth. Without
it, a hand-held camera looks at photographs that scikit-image ships (where it is installed, otherwise at drawn pictures
with the spectrum of natural ones): the camera pans, zooms, turns and shakes, something moves in front of it, and
exposure and sensor noise are added.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.data.video.indexing import index_videos
from avion.data.video.prepare_encode import Encoder, Encoding
from benchmarks.bench_loader import a_video, avions_way, our_way, smooth_noise

CASES = ((4, 1.0), (16, 1.0), (16, 3.0))  # frames, seconds
CROP = 224
DEFAULT = "x264's default"
SETTINGS = {
    "keyframes only": Encoding(gop=1, bframes=0, deblock=True),
    "GOP 16, no B": Encoding(gop=16, bframes=0, deblock=True),
    "GOP 8, 3 B, 3 refs, CABAC": Encoding(gop=8, refs=3, cabac=True, deblock=True),
    "GOP 8, 3 B, CABAC": Encoding(gop=8, cabac=True, deblock=True),
    "GOP 8, 3 B, CAVLC": Encoding(gop=8, deblock=True),
    "GOP 8, 3 B, no deblocking": Encoding(gop=8, bframes=3),
    "GOP 9, 3 B, no deblocking": Encoding(gop=9, bframes=3),
    "GOP 13, 3 B, no deblocking": Encoding(gop=13, bframes=3),
    "GOP 21, 3 B, no deblocking": Encoding(gop=21, bframes=3),
    "GOP 13, 5 B, no deblocking": Encoding(gop=13, bframes=5),
    "GOP 17, 7 B, no deblocking": Encoding(gop=17, bframes=7),
    "GOP 17, 7 B, no deblocking, CRF 22": Encoding(gop=17, bframes=7, crf=22),
    "GOP 17, 7 B, no deblocking, CRF 25": Encoding(gop=17, bframes=7, crf=25),
}


class Default(Encoding):
    """x264 as FFmpeg calls it by default."""

    def options(self) -> dict[str, str]:
        return {}


def photographs(height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return pictures of at least twice the frame's size, uint8 RGB."""
    try:
        import skimage
    except ImportError:
        scenes = []
        for _ in range(3):
            scene = np.stack([smooth_noise(2 * height, 2 * width, rng) * 15 for _ in range(3)], axis=-1)
            scene += 128 + 40 * smooth_noise(2 * height, 2 * width, rng)[:, :, None]
            scenes.append(np.clip(scene, 0, 255).astype(np.uint8))
        return scenes
    folder = Path(skimage.__file__).parent / "data"
    names = ("motorcycle_left.png", "astronaut.png", "coffee.png")
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]


def walk(steps: int, pull: float, push: float, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth random walk around 0, (steps,)."""
    place, speed, places = 0.0, 0.0, []
    for _ in range(steps):
        speed += rng.normal(0, push) - 0.05 * speed - pull * place
        place += speed
        places.append(place)
    return np.array(places)


def hand_held(
    scene: np.ndarray, other: np.ndarray, frames: int, height: int, width: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the frames of a hand-held camera in front of `scene`, past which a piece of `other` moves: (height, width,
    3) uint8.
    """
    picture = Image.fromarray(scene)
    view = min(picture.height / height, picture.width / width)  # scene pixels per pixel, at most
    piece = Image.fromarray(other).resize((width // 3, height // 2)).convert("RGBA")
    x, y = (walk(frames, 0.002, push, rng) for push in (1.2, 0.8))
    zoom, turn = walk(frames, 0.003, 0.004, rng), walk(frames, 0.01, 0.002, rng)
    left, top = walk(frames, 0.004, 1.5, rng), walk(frames, 0.004, 1.0, rng)
    light = 1 + np.clip(walk(frames, 0.01, 0.002, rng), -0.3, 0.3)
    for i in range(frames):
        scale = view * float(np.clip(0.6 + zoom[i], 0.3, 0.95))
        c, s = scale * np.cos(turn[i]), scale * np.sin(turn[i])
        middle = picture.width / 2 + x[i] * scale, picture.height / 2 + y[i] * scale
        shift = middle[0] - c * width / 2 + s * height / 2, middle[1] - s * width / 2 - c * height / 2
        frame = picture.transform(
            (width, height), Image.Transform.AFFINE, (c, -s, shift[0], s, c, shift[1]), Image.Resampling.BICUBIC
        )
        frame.paste(piece, (int(width / 3 + left[i]), int(height / 3 + top[i])))
        pixels = np.asarray(frame, dtype=np.float32) * light[i]
        noise = rng.normal(0, 1, pixels.shape).astype(np.float32) * (1.0 + 0.012 * pixels)  # shot noise
        yield np.clip(pixels + noise, 0, 255).astype(np.uint8)


def real_frames(path: str, height: int) -> list[np.ndarray]:
    """Return the pictures of a video, brought to this height: (height, width, 3) uint8, of an even width."""
    with av.open(path) as container:
        return [
            frame.to_ndarray(
                format="rgb24",
                width=2 * round(frame.width * height / frame.height / 2),
                height=height,
                interpolation="BICUBIC",
            )
            for frame in container.decode(video=0)
        ]


def back_and_forth(shots: list, count: int) -> list:
    """Return `count` pictures: the video, and where it is shorter, then backwards and forwards again, without a cut."""
    if len(shots) < 2:
        raise SystemExit("bench: a video of a single frame is no material")
    turn = shots + shots[-2:0:-1]
    return [turn[i % len(turn)] for i in range(count)]


def material(files: list[str], height: int, width: int, seconds: float) -> list[tuple[str, Fraction, list]]:
    """Return the name, the frames per second and the pictures in yuv420p of every video, each `seconds` long."""
    sources: list[tuple[str, Fraction, Any]] = []
    for file in files:
        with av.open(file) as container:
            rate = container.streams.video[0].average_rate
        count = round(seconds * rate)
        sources.append((Path(file).name, rate, back_and_forth(real_frames(file, height)[:count], count)))
    if not files:
        rng = np.random.default_rng(0)
        scenes = photographs(height, width, rng)
        rate = Fraction(30)
        for i, scene in enumerate(scenes):
            shots = hand_held(scene, scenes[i - 1], round(seconds * rate), height, width, np.random.default_rng(i))
            sources.append((f"hand-held {i}", rate, shots))
    return [
        (name, rate, [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format="yuv420p") for p in shots])
        for name, rate, shots in sources
    ]


def luma(picture) -> np.ndarray:
    plane = picture.planes[0]
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
    return rows[: picture.height, : picture.width].astype(np.float32)


def write(path: Path, shots: list, rate: Fraction, encoding: Encoding) -> float:
    """Encode, and return the mean squared error of luma."""
    ticks = rate.numerator
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(str(path), (shots[0].height, shots[0].width), ticks, rate, encoding)
    for i, shot in enumerate(shots):
        copy = shot.reformat(format="yuv420p")
        encoder.add(copy, i * rate.denominator, rate.denominator)
    encoder.close()
    with av.open(str(path)) as container:
        errors = [
            float(np.mean((luma(a) - luma(b)) ** 2)) for a, b in zip(container.decode(video=0), shots, strict=True)
        ]
    return statistics.mean(errors)


def clip_times(loads: list[Callable], lengths: list[float], clips: int, rounds: int) -> list[list[float]]:
    """Return the CPU time in ms per clip of each case and each way of loading (inner list): the least of the rounds,
    which alternate.
    """
    found = []
    for frames, seconds in CASES:
        times: list[list[float]] = [[] for _ in loads]
        for _ in range(rounds + 1):  # the first is a warm-up
            for load, own in zip(loads, times, strict=True):
                rng = np.random.default_rng(1)
                begin = time.process_time()
                for i in range(clips):
                    start = float(rng.uniform(0, max(lengths[i % len(lengths)] - seconds, 0)))
                    load(f"video{i % len(lengths)}", start, seconds, frames, i)
                own.append(1000 * (time.process_time() - begin) / clips)
        found.append([min(own[1:]) for own in times])
    return found


class Row(NamedTuple):
    """The result of a setting.

    Attributes:
        size: Bytes.
        psnr: The PSNR of luma, in dB.
        ours: The CPU time in ms per clip of each case.
        avion: The same for AVION's way, measured in turn.
    """

    size: int
    psnr: float
    ours: list[float]
    avion: list[float]


def measure(videos: list, encoding: Encoding, root: Path, base: Path, clips: int, rounds: int) -> Row:
    """Measure a setting. `base` is the folder of x264's defaults, which AVION's way reads."""
    errors = []
    for i, (_, rate, shots) in enumerate(videos):
        errors.append(write(root / f"video{i}.mp4" / "0.mp4", shots, rate, encoding))
    index_videos(root)
    loads = [our_way(root, CROP, "pyav", fused=True), avions_way(base, CROP)]
    lengths = [len(shots) / float(rate) for _, rate, shots in videos]
    times = clip_times(loads, lengths, clips, rounds)
    psnr = statistics.mean(10 * np.log10(255**2 / e) for e in errors)
    return Row(sum(f.stat().st_size for f in root.rglob("0.mp4")), psnr, *map(list, zip(*times, strict=True)))


def plot(rows: dict[str, Row], default: str, path: str) -> None:
    """Draw a panel per case: bytes against milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, panels = pyplot.subplots(1, len(CASES), figsize=(14, 5), sharey=True)
    for k, (panel, (frames, seconds)) in enumerate(zip(panels, CASES, strict=True)):
        at = [(row.ours[k], row.size / rows[DEFAULT].size) for row in rows.values()]
        colours = ["tab:red" if name == default else "tab:gray" if name == DEFAULT else "tab:blue" for name in rows]
        for number, (name, place, colour) in enumerate(zip(rows, at, colours, strict=True)):
            panel.plot(*place, "o", color=colour, label=f"{number}  {name}")
        panel.set(title=f"{frames} frames of {seconds:g} s", xlabel="CPU ms per clip", xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
        panel.margins(0.08)
    panels[0].set_ylabel("bytes, relative to x264's default")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    for panel in panels:
        _number(panel)
    figure.savefig(path, dpi=100)


def _number(panel: Any) -> None:
    """Write the number of every point beside it, where neither a point nor another number is."""
    points = [panel.transData.transform((line.get_xdata()[0], line.get_ydata()[0])) for line in panel.lines]
    taken = list(points)
    for number, (line, point) in enumerate(zip(panel.lines, points, strict=True)):
        sides = [(far * x, far * y) for far in (1, 2, 3) for x, y in ((9, 7), (-9, 7), (9, -8), (-9, -8))]
        free = [side for side in sides if min(np.hypot(*(point + side - other)) for other in taken) > 11]
        side = (free or sides)[0]
        taken.append(point + np.array(side))
        panel.annotate(
            str(number),
            (line.get_xdata()[0], line.get_ydata()[0]),
            xytext=(0.72 * side[0], 0.72 * side[1]),  # points of 1/72 inch, at 100 dots per inch
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=line.get_color(),
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="*", type=a_video, default=[], metavar="FILE")
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--width", type=int, default=512, help="of the drawn pictures; that of real ones is their own")
    parser.add_argument("--seconds", type=float, default=15, help="of each video")
    parser.add_argument("--clips", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crf", type=float, help="of all settings but x264's default; else their own")
    parser.add_argument("--only", nargs="*", help="settings to measure, by name")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    videos = material(args.videos, args.height, args.width, args.seconds)
    chosen = Encoding()
    rows: dict[str, Row] = {}
    settings = {DEFAULT: Default(), **{k: v for k, v in SETTINGS.items() if not args.only or k in args.only}}
    print(f"| setting | bytes | PSNR, dB | {' | '.join(f'{n} of {s:g} s' for n, s in CASES)} |\n|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "0"
        for i, (name, encoding) in enumerate(settings.items()):
            if args.crf is not None and name != DEFAULT:
                encoding = dataclasses.replace(encoding, crf=args.crf)
            rows[name] = row = measure(videos, encoding, Path(folder) / str(i), base, args.clips, args.rounds)
            cells = " | ".join(f"{t:.1f} ms, × {a / t:.1f}" for t, a in zip(row.ours, row.avion, strict=True))
            print(f"| {name} | {row.size / rows[DEFAULT].size:.2f} | {row.psnr:.2f} | {cells} |", flush=True)
    if args.plot:
        plot(rows, next((n for n, e in SETTINGS.items() if e == chosen), ""), args.plot)


if __name__ == "__main__":
    main()
