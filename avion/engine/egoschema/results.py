"""The scores of finished videos, kept so that a run that was stopped goes on where it stood."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avion.data.egoschema import OPTIONS, Question
from avion.errors import UserError
from avion.json_lines import append_json, read_json_lines

logger = logging.getLogger(__name__)

Scores = dict[int, list[float]]  # by number of frames, one per option

_PATTERN = "egoschema_results.*.jsonl"


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Return a text that changes with everything that the scores depend on.

    Args:
        model: The model; any change of a weight changes the text.
        settings: The settings, as JSON values.

    Returns:
        The text.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _digest(question: Question) -> str:
    """Return a text that changes with the question, so that a changed question is answered again."""
    return hashlib.sha256("\0".join((question.text, *question.options)).encode()).hexdigest()[:16]


class ResultLog:
    """The file of the videos that one process has finished: a JSON line each, on disk before the next video begins."""

    def __init__(self, folder: Path, rank: int, mark: str):
        self.path, self.mark = folder / f"egoschema_results.{rank}.jsonl", mark

    def append(self, question: Question, scores: Scores) -> None:
        """Append the scores of a question and flush them to disk.

        Args:
            question: The question.
            scores: The scores of the five options by number of frames.

        Raises:
            UserError: The file cannot be written.
        """
        row = {"fingerprint": self.mark, "q_uid": question.uid, "question": _digest(question), "scores": scores}
        try:
            append_json(self.path, row)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); free space or change --output-dir") from e


def read_results(folder: Path, mark: str, questions: Sequence[Question]) -> dict[str, Scores]:
    """Read the scores that runs of the same fingerprint, of any number of processes, have left in a folder.

    Args:
        folder: The folder of the run.
        mark: The fingerprint.
        questions: The questions.

    Returns:
        The scores by q_uid.
    """
    digests = {question.uid: _digest(question) for question in questions}
    found: dict[str, Scores] = {}
    damaged = 0
    for path in sorted(folder.glob(_PATTERN)):
        lines = read_json_lines(path, cure="remove it or change --output-dir")
        damaged += len(lines.damaged)
        for row in lines.objects:
            try:
                if row["fingerprint"] == mark and digests.get(row["q_uid"]) == row["question"]:
                    found.setdefault(row["q_uid"], {}).update(_checked_scores(row["scores"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += 1
    if damaged:
        logger.warning(
            "%s: %d damaged lines (of processes that were killed) are passed over", folder / _PATTERN, damaged
        )
    return found


def _checked_scores(scores: Mapping[str, Any]) -> Scores:
    checked = {int(count): [float(s) for s in row] for count, row in scores.items()}
    if not all(len(row) == OPTIONS and all(map(math.isfinite, row)) for row in checked.values()):
        raise ValueError("scores")
    return checked
