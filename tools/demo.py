"""The main job on the embedded demo dataset: figures before and after, time-reversed pairs, a loss curve.

Runs `main_pretrain.py --config recipes/demo_pretrain.yaml` and evaluates its model before and after. Verbs of the
demo dataset come in pairs that are each other played backwards ("put", "take"), so the last figure shows whether
the model sees time: the same model, fed one frame of each clip, cannot tell a pair apart.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main_pretrain
from avion.data.demo import ensure_demo_dataset
from avion.engine import encode
from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.logging import duration, setup_logging, table
from avion.engine.options import PretrainOptions
from avion.engine.steps import Precision
from avion.engine.tasks import Pretrain
from avion.errors import UserError
from avion.evaluation.reversed_pairs import pair_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo_pretrain.yaml"
# Enough to see that everything works, not enough to learn much.
SHORT = ["--epochs", "2", "--eval-freq", "2", "--warmup-epochs", "0"]
FP32 = Precision("cpu", torch.float32)


def reversed_pairs(task: Pretrain, model: torch.nn.Module, pairs: list[dict], *, one_frame: bool = False) -> float:
    """Accuracy within the reversed pairs, on the task's evaluation clips.

    With `one_frame` the model sees the middle frame of each clip in the place of all its frames.
    """
    order = {narration: i for i, narration in enumerate(task.clips.narration_ids)}
    rows = [order[p["narration_id"]] for p in pairs]
    dataset, prepare = task.val_dataset(), None
    if one_frame:
        dataset, frames = task.val_dataset(num_frames=1), dataset.num_frames
        prepare = lambda video: video.expand(-1, -1, frames, -1, -1)  # noqa: E731  (B, 3, 1, H, W) to T frames
    clips = encode.encode_clips(model, dataset, World(), FP32, prepare=prepare, **encode.settings(task.args))
    texts = [
        encode.encode_texts(model, [p[key] for p in pairs], task.tokenizer, World(), FP32)
        for key in ("text", "partner_text")
    ]
    return pair_accuracy(clips.values[rows], texts[0].values, texts[1].values)["pair_acc"]


def figures(words: list[str], pairs: list[dict], checkpoint: Path | None) -> dict[str, float]:
    """What the report shows of one model."""
    args = parse(PretrainOptions, [*words, "--evaluate"], "demo", "")
    task = Pretrain(args, World())
    torch.manual_seed(args.seed)
    model = task.build_model(None if checkpoint is None else str(checkpoint))
    retrieval = task.evaluate(model, FP32)
    return {
        "mAP": retrieval["avg_map"],
        "nDCG": retrieval["avg_ndcg"],
        "pairs": reversed_pairs(task, model, pairs),
        "one frame": reversed_pairs(task, model, pairs, one_frame=True),
    }


def plot_loss(steps: Path, target: Path) -> None:
    """The loss of every progress line over the steps of the run."""
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    per_epoch = max(r["step"] for r in rows)
    x = [r["epoch"] * per_epoch + r["step"] for r in rows]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(x, [r["loss"] for r in rows], color="tab:blue")
    axes.set(xlabel="optimizer step", ylabel="CLIP loss", title="Pretraining on the demo dataset", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two epochs, to see that everything runs")
    parser.add_argument("--output-dir", default="runs/demo", help="emptied before the run [%(default)s]")
    parser.add_argument("--root", default="datasets/demo", help="where the dataset is, or is made [%(default)s]")
    given = parser.parse_args(argv)
    output = Path(given.output_dir)
    words = [
        "--config",
        str(RECIPE),
        "--root",
        given.root,
        "--output-dir",
        str(output),
        *(SHORT if given.short else []),
    ]

    shutil.rmtree(output, ignore_errors=True)
    # The model is so small that a second thread would mostly wait; the second core decodes video.
    torch.set_num_threads(1)
    setup_logging(World())
    try:
        paths = ensure_demo_dataset(given.root)
        pairs = json.loads(Path(paths.reversed_pairs).read_text())
        before = figures(words, pairs, None)
    except UserError as e:
        print(f"tools/demo.py: error: {e}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    status = main_pretrain.main(words)
    if status != 0:
        return status
    spent = time.perf_counter() - start
    after = figures(words, pairs, output / "checkpoint.pt")
    plot_loss(output / "steps.txt", output / "loss.png")

    print()
    print(table("zero-shot, %", {"untrained": before, "trained": after}))
    print()
    print(f"mAP: {after['mAP'] / before['mAP']:.1f} times the untrained model's, after {duration(spent)} of training")
    print("pairs: right text out of the verb's and its reversal's; one frame: fed the middle frame of each clip only")
    print(f"loss curve: {output / 'loss.png'}; checkpoint: {output / 'checkpoint.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
