"""The stages of `tools/demo.py`: what each stage runs, and its metrics before and after.

This is a file of its own because PyTorch and matplotlib take seconds to import, and `tools/demo.py --help` does not
wait for them.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch

from avion.constants import NORM_STYLES
from avion.data.demo import DemoPaths, ensure_demo_dataset
from avion.data.demo.vocabulary import LABELS
from avion.engine import encode
from avion.engine.args import parse
from avion.engine.console import duration, setup_logging, table
from avion.engine.distributed import World
from avion.engine.egoschema.evaluate import run_egoschema
from avion.engine.inputs import ModelInputs
from avion.engine.options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
    ZeroShotOptions,
)
from avion.engine.precision import Precision
from avion.engine.run_files import PROGRESS
from avion.engine.tasks.finetune_classification import FinetuneClassification
from avion.engine.tasks.finetune_retrieval import FinetuneRetrieval
from avion.engine.tasks.pretrain import Pretrain
from avion.engine.zeroshot.evaluate import run_zeroshot
from avion.evaluation.egoschema import OPTIONS
from avion.evaluation.reversed_pairs import pair_accuracy
from avion.json_lines import read_json_lines
from avion.reproduce.recipe import RECIPES
from avion.weights import Checkpoint, model_from_checkpoint, save_weights

from .finetune_classification import main as run_classification
from .finetune_retrieval import main as run_retrieval
from .pretrain import main as run_pretraining

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Enough to see that everything works, not enough to learn much.
SHORT = ["--epochs", "1", "--eval-freq", "1", "--warmup-epochs", "0"]
# Row of the table: benchmark, metric and the metric of guessing.
ZERO_SHOT_ROWS = {
    "zero-shot actions, top-1": ("ek100_cls", "top1", 1 / len(LABELS)),
    "zero-shot EGTEA, mean class": ("egtea", "mean_class", 1 / len(LABELS)),
    "zero-shot Charades-Ego, mAP": ("charades_ego", "map", None),
    "EgoMCQ, intra-video": ("egomcq", "intra", 1 / OPTIONS),
    "EgoMCQ, inter-video": ("egomcq", "inter", 1 / OPTIONS),
    "captions, text to video R@1": ("retrieval", "txt_r1", None),
}
FP32 = Precision("cpu", torch.float32)


class Failed(Exception):
    """A stage ended with this exit status, after it printed why."""


class Demo:
    """The folders of the demo, and the metrics of the finished stages: {row: {column: metric}}."""

    def __init__(self, paths: DemoPaths, root: str, output: Path, short: bool):
        self.paths = paths
        self.pairs = json.loads(Path(paths.reversed_pairs).read_text())
        self.root, self.output, self.short = root, output, short
        self.metrics: dict[str, dict[str, float]] = {}
        self.spent: dict[str, float] = {}

    def checkpoint(self, stage: str) -> Path:
        """Return the path of the checkpoint of a stage."""
        return self.output / stage / "checkpoint.pt"

    def words(self, stage: str) -> list[str]:
        """Return the command line of a stage, whose recipe says the rest."""
        root = "--demo-root" if stage == "zeroshot" else "--root"
        words = ["--config", str(RECIPES / f"demo_{stage}.yaml"), root, self.root]
        words += ["--output-dir", str(self.output / stage)]
        if stage == "pretrain_long":
            aux = ["--train-metadata-aux", str(self.paths.long_train_pickle)]
            words += ["--train-metadata", str(self.paths.train_pickle), *aux]
        elif stage != "pretrain":
            words += ["--pretrain-model", str(self.checkpoint("pretrain_long"))]
        return words

    def run(self, stage: str, main: Callable[[Sequence[str]], int], *more: str) -> Path:
        """Train, and return the path of the checkpoint."""
        start = time.perf_counter()
        status = main([*self.words(stage), *more, *(SHORT if self.short else [])])
        if status != 0:
            raise Failed(status)
        self.spent[stage] = time.perf_counter() - start
        return self.checkpoint(stage)

    def add(self, row: str, **columns: float) -> None:
        """Add metrics to a row of the table."""
        self.metrics.setdefault(row, {}).update({name.replace("_", " "): value for name, value in columns.items()})


def evaluated(task_class: type, options: type, words: list[str], checkpoint: Path | None) -> tuple:
    """Build a task in evaluation, and the model of a checkpoint (None: the model that training starts from)."""
    args = parse(options, [*words, "--evaluate"], "demo", "")
    task = task_class(args, World(), None if checkpoint is None else Checkpoint.open(checkpoint))
    torch.manual_seed(args.seed)
    return task, task.build_model()


def reversed_pairs(task: Pretrain, model: torch.nn.Module, pairs: list[dict], *, one_frame: bool = False) -> float:
    """Compute the accuracy within the reversed pairs, on the task's evaluation clips.

    With `one_frame` the model sees the middle frame of each clip in the place of all its frames.
    """
    order = {narration: i for i, narration in enumerate(task.clips.narration_ids)}
    rows = [order[p["narration_id"]] for p in pairs]
    inputs, prepare = ModelInputs.of(model.config, task.options), None
    dataset = task.val_dataset(dataclasses.replace(inputs, num_frames=1) if one_frame else inputs)
    if one_frame:
        prepare = lambda video: video.expand(-1, -1, inputs.num_frames, -1, -1)  # noqa: E731  (B, 3, 1, H, W) to T
    clips = encode.encode_clips(model, dataset, World(), FP32, prepare=prepare, **encode.settings(task.options))
    texts = [
        encode.encode_texts(model, [p[key] for p in pairs], inputs.tokens, World(), FP32)
        for key in ("text", "partner_text")
    ]
    return pair_accuracy(clips.values[rows], texts[0].values, texts[1].values)["pair_acc"]


def pretrain(demo: Demo) -> None:
    """Pretrain; measure zero-shot retrieval and reversed pairs, untrained and trained."""
    for column in ("before", "after"):
        checkpoint = None if column == "before" else demo.run("pretrain", run_pretraining)
        task, model = evaluated(Pretrain, PretrainOptions, demo.words("pretrain"), checkpoint)
        retrieval = task.evaluate(model, FP32)
        demo.add("zero-shot retrieval, mAP", **{column: retrieval["avg_map"]})
        demo.add("zero-shot retrieval, nDCG", **{column: retrieval["avg_ndcg"]})
        demo.add("within reversed pairs", **{column: reversed_pairs(task, model, demo.pairs)})
    demo.add("within reversed pairs", one_frame=reversed_pairs(task, model, demo.pairs, one_frame=True))


def pretrain_long(demo: Demo) -> None:
    """Pretrain once more, in a run of its own that starts from the weights alone of the run before."""
    preprocess = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
    weights = demo.output / "pretrain" / "weights.safetensors"
    save_weights(model_from_checkpoint(str(demo.checkpoint("pretrain"))), weights, preprocess)
    demo.run("pretrain_long", run_pretraining, "--resume", str(weights))


def finetune_retrieval(demo: Demo) -> None:
    """Fine-tune for retrieval. The metrics before are those of the pretrained model with the frames of the fine-tuned
    one.
    """
    for column in ("before", "after"):
        checkpoint = None if column == "before" else demo.run("retrieval", run_retrieval)
        words = demo.words("retrieval")
        task, model = evaluated(FinetuneRetrieval, FinetuneRetrievalOptions, words, checkpoint)
        metrics = task.evaluate(model, FP32)
        demo.add("fine-tuned retrieval, mAP", **{column: metrics["avg_map"]})
        demo.add("fine-tuned retrieval, nDCG", **{column: metrics["avg_ndcg"]})


def finetune_actions(demo: Demo) -> None:
    """Fine-tune for action recognition. The metrics before are those of the pretrained tower with an untrained head."""
    for column in ("before", "after"):
        checkpoint = None if column == "before" else demo.run("actions", run_classification)
        words = demo.words("actions")
        task, model = evaluated(FinetuneClassification, FinetuneClassificationOptions, words, checkpoint)
        metrics = task.evaluate(model, FP32)
        for kind in ("verb", "action"):
            demo.add(f"action recognition, {kind} top-1", **{column: metrics[f"{kind}_top1"]})
    control = task.evaluate(model, FP32, one_frame=True)
    for kind in ("verb", "action"):
        demo.add(f"action recognition, {kind} top-1", one_frame=control[f"{kind}_top1"])


def egoschema(demo: Demo) -> None:
    """Answer EgoSchema with the pretrained model on videos of a minute. The metric before is that of guessing."""
    start = time.perf_counter()
    args = parse(EgoSchemaOptions, demo.words("egoschema"), "demo", "")
    metrics = run_egoschema(args)
    demo.spent["egoschema"] = time.perf_counter() - start
    for frames, values in metrics.items():
        demo.add(f"EgoSchema, {frames} frames", before=1 / OPTIONS, after=values["accuracy"])


def zeroshot(demo: Demo) -> None:
    """Run the benchmarks of LaViLa with the pretrained model. The metrics before are those of guessing."""
    start = time.perf_counter()
    found = run_zeroshot(parse(ZeroShotOptions, demo.words("zeroshot"), "demo", ""))
    demo.spent["zeroshot"] = time.perf_counter() - start
    for row, (dataset, metric, chance) in ZERO_SHOT_ROWS.items():
        before = {} if chance is None else {"before": chance}
        demo.add(row, **before, after=found[dataset][metric])


def plot_loss(steps: Path, target: Path) -> None:
    """Draw the loss of every progress line over the optimizer steps of the run."""
    rows = read_json_lines(steps).objects
    per_epoch = max(r["step"] for r in rows)
    x = [r["epoch"] * per_epoch + r["step"] for r in rows]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(x, [r["loss"] for r in rows], color="tab:blue")
    axes.set(xlabel="optimizer step", ylabel="CLIP loss", title="Pretraining on the demo dataset")
    axes.set(xlim=(0, max(x)), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


def run_all(root: str, output: Path, short: bool) -> None:
    """Run all stages one after the other, and print their metrics.

    Args:
        root: The folder of the demo dataset.
        output: The folder of the runs.
        short: Whether each stage trains for one epoch only.

    Raises:
        Failed: A stage ended with an exit status other than 0.
    """
    # The model is so small that a second thread would mostly wait; the second core decodes video.
    torch.set_num_threads(1)
    setup_logging(World())
    demo = Demo(ensure_demo_dataset(root), root, output, short)
    for stage in (pretrain, pretrain_long, finetune_retrieval, finetune_actions, egoschema, zeroshot):
        stage(demo)
    plot_loss(output / "pretrain" / PROGRESS, output / "loss.png")

    print()
    print(table("demo dataset, %", demo.metrics))
    print()
    print(", ".join(f"{stage} {duration(seconds)}" for stage, seconds in demo.spent.items()))
    ratio = demo.metrics["zero-shot retrieval, mAP"]
    print(f"zero-shot mAP is {ratio['after'] / ratio['before']:.1f} times the untrained model's")
    print("one frame: fed the middle frame of each clip only")
    print("before, of EgoSchema, EgoMCQ and classes without training: what guessing is worth")
    print(f"loss curve: {output / 'loss.png'}; checkpoints: {output}/*/checkpoint.pt")
