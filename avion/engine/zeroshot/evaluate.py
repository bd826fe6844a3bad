"""The run of `main_zeroshot.py`: each benchmark reads its annotations, encodes clips and texts, and writes its metrics.

All processes take each step together, a batch at a time. Each batch is on disk before the next one begins.
"""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from avion.constants import ZERO_SHOT
from avion.data.demo import ensure_demo_dataset
from avion.data.transforms import normalize_clip
from avion.data.video import resolve_decoder
from avion.engine import encode
from avion.engine.build import build_as_saved
from avion.engine.console import duration
from avion.engine.demo_data import with_demo_files
from avion.engine.distributed import World
from avion.engine.egoschema.results import fingerprint
from avion.engine.features import extract
from avion.engine.inputs import ModelInputs, warn_of_small_vocabulary
from avion.engine.loader import batches_of, build_loader, read
from avion.engine.mirror import in_working_folder
from avion.engine.options import ZeroShotOptions
from avion.engine.precision import Precision, choose_precision
from avion.engine.run import joined, shared_flags
from avion.engine.run_files import EVALUATIONS
from avion.engine.signals import Stopped, name
from avion.errors import UserError
from avion.files import written_whole
from avion.json_lines import append_json
from avion.weights import Checkpoint

from .benchmarks import BENCHMARKS, Benchmark
from .feature_log import Batch, FeatureLog, read_batches

logger = logging.getLogger(__name__)

# The flags that become paths of the demo dataset, with the attributes of `DemoPaths`.
_DEMO = {
    "ek100_root": "ek100_videos", "ek100_annotations": "annotations", "egtea_root": "egtea_clips",
    "egtea_split": "egtea_split", "egtea_classes": "egtea_classes", "charades_root": "egoschema_videos",
    "charades_split": "charades_split", "charades_classes": "charades_classes", "egomcq_root": "ek100_videos",
    "egomcq_questions": "egomcq", "retrieval_root": "ek100_videos", "retrieval_captions": "captions",
}  # fmt: skip


def run_zeroshot(options: ZeroShotOptions) -> dict[str, dict[str, float]]:
    """Run all benchmarks of `--dataset` and write their files.

    Args:
        options: The flags.

    Returns:
        The metrics by benchmark, on every process.

    Raises:
        UserError: A flag, a file or the environment is wrong.
        Stopped: A signal asked the run to stop; the same options continue from there.
    """
    if not options.dataset:
        raise UserError(f"--dataset: not given; name one or several of {', '.join(ZERO_SHOT)}")
    if not options.pretrain_model:
        raise UserError("--pretrain-model: not given; name the checkpoint to evaluate (a path or hf:owner/repo/file)")
    options = in_working_folder(options)
    with joined(options, options.output_dir) as world:
        world.agree({**shared_flags(options), "torch": torch.__version__})
        if options.demo_root:
            with world.together("making the demo dataset"):
                options = with_demo_files(options, ensure_demo_dataset(options.demo_root), _DEMO)
        run = _Run(options, world)
        found = {chosen: run.benchmark(chosen) for chosen in dict.fromkeys(options.dataset)}
        if world.is_main:
            print(table(found))
        return found


class _Run:
    """The model, and what all benchmarks of a run have in common."""

    def __init__(self, options: ZeroShotOptions, world: World):
        self.options, self.world, self.folder = options, world, Path(options.output_dir)
        with world.together("building the model"):
            self.precision: Precision = choose_precision(options, world.device)
            checkpoint = Checkpoint.open(options.pretrain_model)
            self.model: nn.Module = build_as_saved(options, checkpoint, options.clip_length).to(world.device).eval()
            warn_of_small_vocabulary(self.model.config)
            (self.folder / "features").mkdir(parents=True, exist_ok=True)
        self.weights = fingerprint(self.model, {}) if world.is_main else ""

    def benchmark(self, chosen: str) -> dict[str, float]:
        """Run one benchmark and write its files. Return its metrics."""
        world, metrics = self.world, {}
        with world.together(f"{chosen}: reading the data"):
            bench = BENCHMARKS[chosen](self.options)
            frames = bench.protocol.frames or self.model.config.num_frames
            dataset = bench.dataset(self.model.config.img_size, frames)
        world.agree({f"clips of {chosen}": len(bench.clips), f"texts of {chosen}": len(bench.texts)})
        clips, errors = self._encode_clips(bench, dataset, frames)
        inputs = ModelInputs(self.model.config.img_size, frames, *self._text_sizes())
        texts = encode.encode_texts(self.model, bench.texts, inputs.tokens, world, self.precision)
        with world.together(f"{chosen}: computing the metrics"):
            if world.is_main:
                metrics = self._judge(bench, clips, texts.values, errors)
        return world.broadcast(metrics)

    def _text_sizes(self) -> tuple[int, int]:
        return self.model.config.context_length, self.model.config.vocab_size

    # ---- clips ---------------------------------------------------------------------------------

    def _mark(self, bench: Benchmark, frames: int, batch_size: int) -> str:
        """Return a text that changes with everything that the features of a benchmark depend on."""
        options = self.options
        settings = {
            "benchmark": bench.name,
            "clips": bench.digest(),
            "root": bench.root,
            "weights": self.weights,
            "model": {k: v for k, v in dataclasses.asdict(self.model.config).items()},
            "frames": frames,
            "stride": bench.protocol.stride,
            "windows": bench.protocol.windows,
            "crops": bench.protocol.crops,
            "batch": batch_size,
            "norm_style": options.norm_style,
            "precision": str(self.precision.dtype),
            "device": self.world.device.type,
            "decoder": resolve_decoder(options.decoder),
            "layout": options.video_layout,
            "chunk": options.video_chunk_length,
        }
        return fingerprint(nn.Module(), settings)

    def _encode_clips(self, bench: Benchmark, dataset: Any, frames: int) -> tuple[np.ndarray, dict[int, str]]:
        """Return the features of all clips, (n, V, E), and the errors of clips by their numbers. Only on the main
        process.
        """
        world, views = self.world, bench.protocol.views
        each = max(self.options.batch_size // views, 1)
        plan = [list(range(first, min(first + each, len(bench.clips)))) for first in range(0, len(bench.clips), each)]
        with world.together(f"{bench.name}: reading the finished batches"):
            mark = self._mark(bench, frames, each) if world.is_main else ""
            before = read_batches(self.folder / "features", bench.name, mark, plan) if world.is_main else {}
        mark, done = world.broadcast((mark, sorted(before)))
        todo = [number for number in range(len(plan)) if number not in set(done)]
        logger.info(
            "%s: %d clips, %d of %d batches read before, %d frames x %d views, %s on %s",
            bench.name,
            len(bench.clips),
            len(done),
            len(plan),
            frames,
            views,
            str(self.precision.dtype).removeprefix("torch."),
            world,
        )
        log = FeatureLog(self.folder / "features", bench.name, world.rank, mark)
        own, errors = self._encode_share(bench, dataset, log, plan, todo) if todo else ({}, {})
        found = dict(before)
        for batches, failed in world.gather((own, errors)):
            found.update(batches)
            errors.update(failed)
        with world.together(f"{bench.name}: reading the videos"):
            self._check(bench, errors)
        return _assembled(found, len(bench.clips)) if world.is_main else np.zeros((0, 0, 0)), errors

    def _encode_share(
        self, bench: Benchmark, dataset: Any, log: FeatureLog, plan: list[list[int]], todo: list[int]
    ) -> tuple[dict[int, Batch], dict[int, str]]:
        """Encode every size-th batch. All processes take each step together, a batch at a time."""
        world, start = self.world, time.perf_counter()
        own = todo[world.rank :: world.size]
        # The batches are the same for any number of processes, and a clip is in one of them.
        loader = build_loader(
            dataset,
            [plan[k] for k in own],
            workers=self.options.workers,
            device=world.device,
            timeout=self.options.data_timeout,
        )
        samples = batches_of(loader)
        found: dict[int, Batch] = {}
        errors: dict[int, str] = {}
        rounds = math.ceil(len(todo) / world.size)
        for done in range(1, rounds + 1):
            failure: Exception | None = None
            if done <= len(own):
                try:
                    number = own[done - 1]
                    found[number] = self._encode_batch(read(samples), plan[number], errors)
                    # A batch with a clip that cannot be read is read again by the next run.
                    if errors.keys().isdisjoint(plan[number]):
                        log.append(number, found[number])
                except Exception as e:  # raised below, once the other processes know
                    failure = e
            asked = world.go_on(failure, f"encoding the clips of {bench.name}")
            if asked:
                left = max(len(todo) - done * world.size, 0)
                raise Stopped(f"{name(asked)} with {left} batches of {bench.name} left; {self.folder} keeps the others")
            if done % self.options.print_freq == 0 or done == rounds:
                pace = (time.perf_counter() - start) / done
                logger.info(
                    "%s: batch %d of %d, %s left",
                    bench.name,
                    min(done * world.size, len(todo)),
                    len(todo),
                    duration(pace * (rounds - done)),
                )
        return found, errors

    def _encode_batch(self, batch: dict[str, Any], rows: list[int], errors: dict[int, str]) -> Batch:
        """Encode a batch of `video` (clips, V, 3, T, S, S) uint8 and `error`, whose clips have the numbers `rows`."""
        failed = {row: error for row, error in zip(rows, batch["error"], strict=True) if error}
        if failed and self.options.strict_data:
            raise UserError(f"--strict-data: {next(iter(failed.values()))}")
        errors.update(failed)
        video = batch["video"]
        views, parts = video.flatten(0, 1), []
        for some in views.split(self.options.batch_size):
            some = normalize_clip(some.to(self.world.device, non_blocking=True), self.options.norm_style)
            with self.precision.autocast():
                parts.append(extract(self.model, some, ["clip"])["clip"].float().cpu())
        features = torch.cat(parts).unflatten(0, video.shape[:2])  # (clips, V, E)
        if not torch.isfinite(features).all():
            raise UserError("the features of some clips are not finite; use --precision bf16")
        return Batch(rows, features.numpy())

    def _check(self, bench: Benchmark, errors: dict[int, str]) -> None:
        if not errors:
            return
        if len(errors) == len(bench.clips):
            raise UserError(f"{bench.flag} {bench.root}: no clip can be read: {encode.describe(errors, 1)}")
        logger.warning(
            "%s: %d of %d clips cannot be read and are left out of the metrics: %s",
            bench.name,
            len(errors),
            len(bench.clips),
            encode.describe(errors),
        )

    # ---- metrics -------------------------------------------------------------------------------

    def _judge(self, bench: Benchmark, clips: np.ndarray, texts: np.ndarray, errors: dict[int, str]) -> dict[str, Any]:
        if not np.isfinite(texts).all():
            raise UserError("the features of some texts are not finite; use --precision bf16")
        readable = np.array([i for i in range(len(clips)) if i not in errors], dtype=np.int64)
        metrics, files = bench.judge(clips, texts, readable)
        for file_name, content in files.items():
            with written_whole(self.folder / file_name) as file:
                file.write(content)
        metrics |= {"clips": len(readable), "unreadable": len(errors)}
        row = {"dataset": bench.name, **metrics, "checkpoint": self.options.pretrain_model}
        append_json(self.folder / EVALUATIONS, row)
        logger.info("%s: %s", bench.name, ", ".join(f"{n} {100 * metrics[k]:.2f}" for k, n in _shown(bench, metrics)))
        return metrics


def _assembled(batches: dict[int, Batch], count: int) -> np.ndarray:
    """Put the features of all clips in their order, (count, V, E). Every clip is in one batch."""
    first = next(iter(batches.values())).values
    values = np.zeros((count, *first.shape[1:]), dtype=np.float32)
    seen = np.zeros(count, dtype=np.int64)
    for batch in batches.values():
        values[batch.rows] = batch.values
        seen[batch.rows] += 1
    assert (seen == 1).all(), f"{(seen != 1).sum()} of {count} clips were not encoded exactly once"
    return values


def _shown(bench: Benchmark | type[Benchmark], metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return the headline metrics that were computed: their names in the log, and their names for people."""
    return [(key, label) for key, label in bench.headline.items() if key in metrics]


def table(found: dict[str, dict[str, float]]) -> str:
    """Format the headline metrics of all benchmarks in percent, one per line."""
    lines = []
    for chosen, metrics in found.items():
        left_out = f"{metrics['unreadable']} unreadable" if metrics["unreadable"] else ""
        for place, (key, label) in enumerate(_shown(BENCHMARKS[chosen], metrics)):
            about = (chosen, str(metrics["clips"]), left_out) if place == 0 else ("", "", "")
            lines.append(f"{about[0]:<13} {label:<22} {100 * metrics[key]:>6.2f}  {about[1]:>7}  {about[2]}".rstrip())
    head = f"{'zero-shot':<13} {'metric':<22} {'%':>6}  {'clips':>7}"
    return "\n".join([head, "-" * len(head), *lines])
