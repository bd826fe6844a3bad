"""Films the demo videos: takes, the walk along the table that joins them, and H.264 chunks.

A take is one action filmed once: the hand comes in, acts, and goes. Its frames serve twice in a video, once
as they are (the pair's first verb) and once in the opposite order (its second verb), so the frames of a
verb's clips are those of its partner's played backwards, to the pixel, up to what x264 makes of them.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageChops

from avion.data.demo.backdrop import Room, draw_backdrop, draw_room, light_map
from avion.data.demo.canvas import HEIGHT, WIDTH, Canvas
from avion.data.demo.hand import HandStyle, draw_hand
from avion.data.demo.scenes import MOTIONS
from avion.data.demo.vocabulary import Label

SUPERSAMPLING = 2
LEAD_SECONDS = 0.4  # the hand's way in and out, before and after an action
PAN_SECONDS = 0.4
CHUNK_SECONDS = 15
FRAME_RATES = (10, 12, 15)


@dataclass(frozen=True)
class Take:
    """One action, filmed once in its forward direction.

    frames: (F, H, W, 3) uint8; ends: the table before and after it without the hand, (2, H, W, 3) uint8;
    start, stop: seconds from the first frame's beginning between which the action is annotated.
    """

    label: Label
    frames: np.ndarray
    ends: np.ndarray
    start: float
    stop: float


@dataclass(frozen=True)
class Clip:
    """An annotated interval of a video, in seconds."""

    label: Label
    start: float
    stop: float


@dataclass(frozen=True)
class Video:
    """frames: (F, H, W, 3) uint8."""

    frames: np.ndarray
    fps: int
    clips: tuple[Clip, ...]


def _smooth(t: float) -> float:
    t = min(max(t, 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@dataclass(frozen=True)
class _Timing:
    """An action that lasts from 0 to `duration` seconds and moves between `still[0]` and `1 - still[1]` of it."""

    duration: float
    still: tuple[float, float]
    waves: np.ndarray  # (2, 3, 3): per axis three sines of amplitude (units), frequency (Hz), angle

    def phase(self, t: float) -> float:
        first, last = self.still
        return _smooth((t / self.duration - first) / (1.0 - first - last))

    def distance(self, t: float) -> float:
        """How far off the hand is: 0 while it acts, 1 when it is out of the picture."""
        first, last = (share * self.duration for share in self.still)
        before = (first - t) / (first + LEAD_SECONDS)
        after = (t - self.duration + last) / (last + LEAD_SECONDS)
        return _smooth(max(before, after))

    def shake(self, t: float) -> tuple[float, float]:
        sums = (self.waves[:, :, 0] * np.sin(self.waves[:, :, 1] * t + self.waves[:, :, 2])).sum(axis=1)
        return float(sums[0]), float(sums[1])


def _draw_timing(rng: np.random.Generator) -> _Timing:
    waves = np.stack(
        [rng.uniform(0.2, 0.8, (2, 3)), rng.uniform(1.5, 9.0, (2, 3)), rng.uniform(0, 2 * math.pi, (2, 3))], axis=2
    )
    first, last = rng.uniform(0.1, 0.24, 2)
    return _Timing(float(rng.uniform(1.1, 2.2)), (float(first), float(last)), waves)


def film_take(
    label: Label, room: Room, rng: np.random.Generator, fps: int, scale: int = 1, duration: float | None = None
) -> Take:
    """Films `label`'s action in the forward direction, whichever direction the label has.

    scale: frames are `scale` times 128 × 96 (the videos have 1). duration: seconds that the action takes, a second or
    two unless given.
    """
    motion = MOTIONS[label.pair.forward](label.noun, rng)
    timing = _draw_timing(rng)
    if duration is not None:
        timing = replace(timing, duration=duration)
    pads = rng.uniform(0.0, 0.2, 2)
    style = HandStyle(room.skin, room.sleeve, float(rng.uniform(0.95, 1.15)), (float(rng.uniform(88, 118)), 122.0))
    still = Canvas(SUPERSAMPLING * scale)
    draw_backdrop(still, room, rng)
    motion.draw_still(still)
    light = light_map(room, rng, (WIDTH * scale, HEIGHT * scale))

    def picture(t: float, with_hand: bool) -> np.ndarray:
        canvas = still.copy()
        contact = np.array(motion.draw_moving(canvas, timing.phase(t)))
        if with_hand:
            away = np.array([style.shoulder[0] - contact[0], style.shoulder[1] + 12 - contact[1]])
            draw_hand(canvas, style, tuple(contact + timing.distance(t) * away), motion.grip)
        frame = ImageChops.multiply(canvas.frame(timing.shake(t), SUPERSAMPLING), light)
        if room.left_handed:
            frame = frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(frame)

    count = round((timing.duration + 2 * LEAD_SECONDS) * fps)
    lead = (count / fps - timing.duration) / 2  # whole frames, and the same before and after
    times = (np.arange(count) + 0.5) / fps - lead
    frames = np.stack([picture(float(t), with_hand=True) for t in times])
    ends = np.stack([picture(float(t), with_hand=False) for t in (times[0], times[-1])])
    return Take(label, frames, ends, lead - float(pads[0]), lead + timing.duration + float(pads[1]))


def _visits(count: int, rng: np.random.Generator) -> list[tuple[int, bool]]:
    """The order in which `count` takes are shown: each twice, (take, backward), never twice in a row."""
    while True:
        order = rng.permutation(np.repeat(np.arange(count), 2)).tolist()
        if count < 2 or all(a != b for a, b in zip(order, order[1:], strict=False)):
            break
    backward = (rng.random(count) < 0.5).tolist()
    visits = []
    for index in order:
        visits.append((index, backward[index]))
        backward[index] = not backward[index]
    return visits


def _pan(before: np.ndarray, after: np.ndarray, steps: int, rightwards: bool) -> list[np.ndarray]:
    """Turns the camera from one spot of the long table to another: (H, W, 3) to (H, W, 3)."""
    strip = np.concatenate([before, after] if rightwards else [after, before], axis=1)
    width = before.shape[1]
    offsets = [round(width * _smooth((i + 1) / (steps + 1))) for i in range(steps)]
    return [strip[:, (o if rightwards else width - o) :][:, :width] for o in offsets]


def film_video(labels: list[Label], rng: np.random.Generator, fps: int) -> Video:
    """A video that shows each of `labels`' actions twice: in one direction and, later, in the other."""
    room = draw_room(rng)
    takes = [film_take(label, room, rng, fps) for label in labels]
    frames: list[np.ndarray] = []
    clips = []
    previous: tuple[int, np.ndarray] | None = None
    for index, backward in _visits(len(takes), rng):
        take = takes[index]
        step = -1 if backward else 1
        if previous is not None:
            frames += _pan(previous[1], take.ends[::step][0], round(PAN_SECONDS * fps), index > previous[0])
        begin, length = len(frames) / fps, len(take.frames) / fps
        start, stop = (length - take.stop, length - take.start) if backward else (take.start, take.stop)
        clips.append(Clip(take.label._replace(backward=backward), begin + start, begin + stop))
        frames += list(take.frames[::step])
        previous = index, take.ends[::step][1]
    return Video(np.stack(frames), fps, tuple(clips))


def write_chunks(folder: Path, video: Video) -> None:
    """Writes `{folder}/{start}.mp4` for start = 0, 15, 30, … seconds; the suffix is spelt as the folder's."""
    folder.mkdir(parents=True)
    per_chunk = CHUNK_SECONDS * video.fps
    for first in range(0, len(video.frames), per_chunk):
        path = folder / f"{first // video.fps}{folder.suffix}"
        encode(path, video.frames[first : first + per_chunk], video.fps)


def encode(path: Path, frames: np.ndarray, fps: int, *, crf: int = 21, keyframe_interval: int = 15) -> None:
    """Writes frames (F, H, W, 3) uint8 as H.264 in an MP4, without B-frames. crf: higher is smaller and worse."""
    options = {
        "preset": "veryfast",
        "crf": str(crf),
        # One thread: the number of threads changes what x264 writes. Keyframes close together: cheap seeks.
        "x264-params": f"threads=1:keyint={keyframe_interval}:min-keyint={keyframe_interval}:scenecut=0:bframes=0",
    }
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
