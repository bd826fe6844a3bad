"""Draws `demo_clips.npz`: clips of the demo dataset as pretraining sees them, decoded and tokenised.

    python -m tests.gpu.make_clips

So a machine with a GPU needs no video decoder and no tokenizer to pretrain the demo's model for some steps.
"""

import numpy as np
from PIL import Image

from avion.data.demo.backdrop import draw_room
from avion.data.demo.film import film_take
from avion.data.demo.vocabulary import LABELS, training_sentence
from avion.data.tokenizer import tokenize
from tests.gpu.pretraining import CLIPS

COUNT, FRAMES, SIZE, CONTEXT = 48, 4, 48, 16  # of recipes/demo_pretrain.yaml, but for the count


def draw(index: int) -> tuple[np.ndarray, str]:
    """Frames (T, H, W, 3) uint8 and a sentence; an action played backwards runs backwards."""
    rng = np.random.default_rng(index)
    label = LABELS[index % len(LABELS)]
    take = film_take(label, draw_room(rng), rng, fps=24)
    first, last = (round(seconds * 24) for seconds in (take.start, take.stop))
    picks = np.linspace(first + 1, last - 2, FRAMES).round().astype(int)
    frames = [Image.fromarray(take.frames[i]).resize((SIZE * 4 // 3, SIZE)) for i in picks]
    left = (SIZE * 4 // 3 - SIZE) // 2
    cropped = np.stack([np.asarray(frame)[:, left : left + SIZE] for frame in frames])
    return cropped[::-1] if label.backward else cropped, training_sentence(label, rng)


def main() -> None:
    frames, sentences = zip(*(draw(i) for i in range(COUNT)), strict=True)
    tokens = tokenize(list(sentences), CONTEXT).numpy().astype(np.int32)
    np.savez_compressed(CLIPS, frames=np.stack(frames), tokens=tokens)
    print(f"{CLIPS}: {CLIPS.stat().st_size / 1e6:.2f} MB, e.g. {sentences[0]!r}")


if __name__ == "__main__":
    main()
