"""The run of `main_egoschema.py`.

It reads the questions and encodes the texts once. The processes share the videos and answer them one by one. Then the
run gathers, writes and sends the answers.
"""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avion.data.captions import read_narrations
from avion.data.egoschema import LongVideos, Question, read_answers, read_questions, read_sources
from avion.data.transforms import normalize_clip
from avion.data.video import resolve_decoder
from avion.engine import encode
from avion.engine.build import build_as_saved
from avion.engine.console import duration
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.loader import batches_of, build_loader, read
from avion.engine.mirror import in_working_folder
from avion.engine.options import EgoSchemaOptions
from avion.engine.precision import Precision, choose_precision
from avion.engine.run import joined, shared_flags
from avion.engine.run_files import EVALUATIONS
from avion.engine.signals import Stopped, name
from avion.errors import UserError, say
from avion.evaluation.vectors import unit
from avion.files import write_text
from avion.json_lines import append_json
from avion.models.long_video import default_max_tokens, encode_long_video, memory_bytes
from avion.weights import Checkpoint

from .answers import choose_answers, metrics_of, submit, table, write_answers
from .results import ResultLog, Scores, fingerprint, read_results
from .texts import DEFAULT_PROMPT, OptionTexts, encode_options, parse_prompt

logger = logging.getLogger(__name__)

_FRAMES = 16
# The mark of the scores of a sampling. Earlier versions, which repeated the last frame, used the mark "prefix".
_RULES = {"uniform": "uniform", "prefix": "prefix-spread", "prefix-hold": "prefix"}


def run_egoschema(options: EgoSchemaOptions) -> dict[int, dict[str, float]]:
    """Answer all questions and write the files.

    Args:
        options: The flags.

    Returns:
        The metrics by number of frames; nothing without `--answers`.

    Raises:
        UserError: A flag, a file or the environment is wrong.
        Stopped: A signal asked the run to stop; the same options continue from there.
    """
    options = in_working_folder(_settled(options))
    with joined(options, options.output_dir) as world:
        world.agree({**shared_flags(options), "torch": torch.__version__})
        run = _Run(options, world)
        results, errors = run.results()
        with world.together("writing the answers"):
            metrics = run.write(results, errors) if world.is_main else {}
        if options.submit:
            with world.together("sending the answers"):
                if world.is_main:
                    run.send(results)
        return world.broadcast(metrics)


def _settled(options: EgoSchemaOptions) -> EgoSchemaOptions:
    """Fill in the defaults of the lists. Combinations that make no sense are a UserError."""
    options = dataclasses.replace(
        options, frames=sorted(set(options.frames)) or [_FRAMES], prompt=options.prompt or [DEFAULT_PROMPT]
    )
    for prompt in options.prompt:
        parse_prompt(prompt)
    if not options.pretrain_model:
        raise UserError("--pretrain-model: not given; name the checkpoint to evaluate (a path or hf:owner/repo/file)")
    if bool(options.uid_to_ego4d) != bool(options.pretrain_metadata):
        raise UserError("--uid-to-ego4d and --pretrain-metadata: give both to find common videos, or neither")
    if options.exclude_overlap and not options.uid_to_ego4d:
        raise UserError("--exclude-overlap: needs --uid-to-ego4d and --pretrain-metadata to know what to leave out")
    if options.exclude_overlap and not options.answers and options.dataset != "demo":
        raise UserError("--exclude-overlap: leaves questions out of the accuracy, for which --answers is missing")
    if options.submit and len(options.frames) > 1:
        raise UserError(f"--submit: sends one set of answers, but --frames asks for {len(options.frames)}; give one")
    if options.submit and not options.submit_url.startswith(("http://", "https://")):
        raise UserError(
            f"--submit-url {options.submit_url}: an address that begins with http:// or https:// is required"
        )
    return options


def find_overlap(questions: Sequence[Question], sources: str, narrations: Sequence[str]) -> frozenset[str]:
    """Find the questions whose Ego4D video is in the narrations of the pretraining.

    Args:
        questions: The questions.
        sources: The path of uid_to_ego4d.json, which names the Ego4D video of each question.
        narrations: The files of narrations.

    Returns:
        The q_uids of these questions.
    """
    source_of = read_sources(sources)
    trained_on = set(read_narrations(narrations).videos)
    unknown = sum(question.uid not in source_of for question in questions)
    common = frozenset(q.uid for q in questions if source_of.get(q.uid) in trained_on)
    videos = {source_of[uid] for uid in common}
    logger.info(
        "overlap: %d of %d EgoSchema videos (of %d Ego4D videos) lie in the pretraining narrations%s",
        len(common),
        len(questions),
        len(videos),
        f"; the source of {unknown} is unknown" if unknown else "",
    )
    return common


class _Run:
    """One evaluation: the questions, the model and the videos."""

    def __init__(self, options: EgoSchemaOptions, world: World):
        with world.together("reading the data"):
            if options.dataset == "demo":
                options = on_demo_dataset(
                    options, "egoschema_videos", questions="egoschema_questions", answers="egoschema_answers"
                )
            self.options, self.world, self.folder = options, world, Path(options.output_dir)
            self.precision: Precision = choose_precision(options, world.device)
            self.questions = read_questions(options.questions)
            self.truth = read_answers(options.answers, self.questions) if options.answers else {}
            self.decoder = resolve_decoder(options.decoder)
        self.left_out = self._overlap()
        with world.together("building the model"):
            checkpoint = Checkpoint.open(options.pretrain_model)
            self.model: nn.Module = build_as_saved(options, checkpoint, options.frames[0]).to(world.device).eval()
            self.config = self.model.config
            self.videos = LongVideos(
                self.questions,
                options.root,
                size=self.config.img_size,
                sampling=options.sampling,
                decoder=options.decoder,
                threads=options.decode_threads,
            )
            self.max_tokens = options.max_tokens or default_max_tokens(world.device)
            mark = fingerprint(self.model, self._settings() | {"sampling": _RULES[options.sampling]})
        world.agree({"questions": len(self.questions), "weights and settings": mark})
        world.stop_if_asked("before the first video")
        self.log = ResultLog(self.folder, world.rank, mark)

    def _settings(self) -> dict[str, Any]:
        """Return what the scores depend on besides the weights."""
        options = self.options
        return {
            "model": dataclasses.asdict(self.config),
            "sampling": options.sampling,
            "prompts": options.prompt,
            "norm_style": options.norm_style,
            "precision": str(self.precision.dtype),
            "device": self.world.device.type,
            "decoder": self.decoder,
            "root": str(Path(options.root).resolve()),
        }

    def _overlap(self) -> frozenset[str]:
        """Find the q_uids that are left out of the metrics. The number of common videos is logged in any case."""
        options, world = self.options, self.world
        common: frozenset[str] = frozenset()
        with world.together("comparing with the pretraining videos"):
            if options.uid_to_ego4d and world.is_main:
                common = find_overlap(self.questions, options.uid_to_ego4d, options.pretrain_metadata)
        common = world.broadcast(common)
        return common if options.exclude_overlap else frozenset()

    def results(self) -> tuple[dict[str, Scores], dict[str, str]]:
        """Return the scores and the errors by q_uid, on every process, of earlier runs and of this one."""
        world, done = self.world, {}
        with world.together("reading earlier results"):
            if world.is_main:
                done = read_results(self.folder, self.log.mark, self.questions)
        done = world.broadcast(done)
        todo = []
        for i, question in enumerate(self.questions):
            missing = tuple(n for n in self.options.frames if n not in done.get(question.uid, {}))
            if missing:
                todo.append((i, missing))
        before = len(self.questions) - len(todo)
        logger.info(
            "%s: %d questions, %d of them answered before, %s frames (%s), %s on %s",
            self.config.name,
            len(self.questions),
            before,
            ", ".join(map(str, self.options.frames)),
            self.options.sampling,
            str(self.precision.dtype).removeprefix("torch."),
            world,
        )
        own, errors = self._answer(todo) if todo else ({}, {})
        for part, failed in world.gather((own, errors)):
            errors.update(failed)
            for uid, scores in part.items():
                done.setdefault(uid, {}).update(scores)
        with world.together("reading the videos"):
            if errors and len(errors) == len(self.questions):
                raise UserError(f"--root {self.options.root}: no video can be read: {encode.describe(errors, 1)}")
        return done, errors

    def _answer(self, todo: list[tuple[int, tuple[int, ...]]]) -> tuple[dict[str, Scores], dict[str, str]]:
        """Answer the share of this process: every size-th video. All processes take each step together, a video at a
        time.
        """
        world = self.world
        texts = encode_options(self.model, self.questions, self.options.prompt, world, self.precision)
        self._tell_memory()
        own = todo[world.rank :: world.size]
        loader = build_loader(
            self.videos,
            own,
            workers=self.options.workers,
            device=world.device,
            timeout=self.options.data_timeout,
            large_samples=True,
        )
        samples = batches_of(loader)
        results: dict[str, Scores] = {}
        errors: dict[str, str] = {}
        start = time.perf_counter()
        rounds = math.ceil(len(todo) / world.size)
        for done in range(1, rounds + 1):
            failure: Exception | None = None
            if done <= len(own):
                try:
                    self._answer_one(read(samples), texts, results, errors)
                except Exception as e:  # raised below, once the other processes know
                    failure = e
            asked = world.go_on(failure, "answering the question")
            if asked:
                left = max(len(todo) - done * world.size, 0)
                raise Stopped(f"{name(asked)} with {left} videos left; {self.folder} keeps the answers so far")
            if done % self.options.print_freq == 0 or done == rounds:
                pace = (time.perf_counter() - start) / done
                logger.info(
                    "video %d of %d, %.2f s each, %s left",
                    min(done * world.size, len(todo)),
                    len(todo),
                    pace / world.size,
                    duration(pace * (rounds - done)),
                )
        return results, errors

    def _answer_one(
        self, sample: dict[str, Any], texts: OptionTexts, results: dict[str, Scores], errors: dict[str, str]
    ) -> None:
        question = self.questions[sample["index"]]
        if sample["error"]:
            if self.options.strict:
                raise UserError(f"--strict: {sample['error']}")
            logger.warning("video cannot be read: %s", sample["error"])
            errors[question.uid] = sample["error"]
            return
        options, scores = texts.of(question, self.options.prompt), {}
        for count, positions in sample["clips"].items():
            with self.precision.autocast():
                feature = encode_long_video(
                    self.model,
                    functools.partial(self._frames, sample["frames"], positions),
                    count,
                    max_tokens=self.max_tokens,
                )
            if not torch.isfinite(feature).all():
                raise UserError(f"{question.uid}: the features of {count} frames are not finite; use --precision bf16")
            scores[count] = (options @ unit(feature.float().cpu().numpy())).tolist()
        self.log.append(question, scores)
        results[question.uid] = scores

    def _frames(self, frames: torch.Tensor, positions: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the frames [start, stop) of a clip, normalised, (3, stop - start, size, size) on the device."""
        some = frames[positions[start:stop]].to(self.world.device).transpose(0, 1)
        return normalize_clip(some, self.options.norm_style)

    def _tell_memory(self) -> None:
        autocast = self.precision.dtype is not torch.float32
        largest = self.options.frames[-1]
        parts = memory_bytes(self.config, largest, autocast=autocast, max_tokens=self.max_tokens)
        logger.info("memory for %d frames: at most %.1f GB beside the weights", largest, sum(parts.values()) / 1e9)

    def write(self, results: dict[str, Scores], errors: dict[str, str]) -> dict[int, dict[str, float]]:
        """Write all files, and the table to stdout. Return the metrics by number of frames."""
        answers = {n: choose_answers(self.questions, results, n) for n in self.options.frames}
        metrics = {n: metrics_of(answers[n], self.truth, self.left_out) for n in answers} if self.truth else {}
        for count in answers:
            write_answers(self.folder, count, answers[count])
        report = {
            "checkpoint": self.options.pretrain_model,
            "settings": self._settings(),
            "figures": metrics,
            "left_out": sorted(self.left_out),
            "unreadable": errors,
            "scores": {
                q.uid: {n: row for n, row in results[q.uid].items() if n in answers}
                for q in self.questions
                if q.uid in results
            },
        }
        write_text(self.folder / "egoschema_scores.json", json.dumps(report, indent=1) + "\n")
        source = {"sampling": self.options.sampling, "checkpoint": self.options.pretrain_model}
        for count, row in metrics.items():
            append_json(self.folder / EVALUATIONS, {"frames": count, **row, **source})
        if self.truth and self.left_out:
            logger.info("%d questions about pretraining videos are in no accuracy", len(self.left_out))
        if errors:
            logger.warning(
                "%d of %d videos cannot be read; their questions are in no answer file and in no accuracy: %s",
                len(errors),
                len(self.questions),
                encode.describe(errors),
            )
        print(table(metrics, {n: len(answers[n]) for n in answers}, len(self.questions)))
        return metrics

    def send(self, results: dict[str, Scores]) -> None:
        """Send the answers to the server. A question without an answer is a UserError."""
        (count,) = self.options.frames
        answers = choose_answers(self.questions, results, count)
        if len(answers) < len(self.questions):
            raise UserError(
                f"--submit: nothing was sent, {len(self.questions) - len(answers)} of {len(self.questions)} questions "
                "have no answer, since their videos cannot be read; the files are written"
            )
        reply = submit(self.options.submit_url, answers)
        logger.info("%d answers sent to %s", len(answers), self.options.submit_url)
        say(f"the server says: {reply}")
