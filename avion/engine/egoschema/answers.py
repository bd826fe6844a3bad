"""Writes the results of a run: two files for the server for each number of frames, all scores, and a table."""

import csv
import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avion.data.egoschema import Question
from avion.errors import UserError
from avion.evaluation.egoschema import accuracy, choose
from avion.files import write_text

from .results import Scores

logger = logging.getLogger(__name__)

Answers = dict[str, int]
_TIMEOUT_S = 120
_SHOWN_REPLY = 2000  # characters


def choose_answers(questions: Sequence[Question], results: Mapping[str, Scores], count: int) -> Answers:
    """Choose the option of the highest score for each question.

    Args:
        questions: The questions.
        results: The scores by q_uid.
        count: The number of frames whose scores count.

    Returns:
        The number of the chosen option, 0 to 4, by q_uid, in the order of the questions. Questions about unreadable
        videos are left out.
    """
    uids = [question.uid for question in questions if count in results.get(question.uid, {})]
    if not uids:
        return {}
    chosen = choose(np.array([results[uid][count] for uid in uids]))
    return dict(zip(uids, chosen.tolist(), strict=True))


def metrics_of(answers: Answers, truth: Mapping[str, int], left_out: frozenset[str]) -> dict[str, float]:
    """Compute the accuracy over the questions that have a public answer, were answered and are not left out.

    Args:
        answers: The chosen options by q_uid.
        truth: The public answers by q_uid.
        left_out: The q_uids of questions that do not count.

    Returns:
        The metrics; `unreadable` is the number of questions with a public answer that were not answered.
    """
    judged = [uid for uid in truth if uid not in left_out]
    answered = [uid for uid in judged if uid in answers]
    metrics = accuracy(np.array([answers[u] for u in answered], int), np.array([truth[u] for u in answered], int))
    return {**metrics, "unreadable": len(judged) - len(answered)}


def write_answers(folder: Path, count: int, answers: Answers) -> tuple[Path, Path]:
    """Write `egoschema_{count}.json` ({q_uid: int}) and `egoschema_{count}.csv` (q_uid,answer).

    Args:
        folder: The folder.
        count: The number of frames.
        answers: The chosen options by q_uid.

    Returns:
        The paths of the two files.

    Raises:
        UserError: A file cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["q_uid", "answer"])
    writer.writerows(answers.items())
    paths = folder / f"egoschema_{count}.json", folder / f"egoschema_{count}.csv"
    write_text(paths[0], json.dumps(answers, indent=0) + "\n")
    write_text(paths[1], table.getvalue())
    return paths


def table(metrics: Mapping[int, Mapping[str, Any]], answered: Mapping[int, int], total: int) -> str:
    """Format a table with a line per number of frames.

    Args:
        metrics: The metrics by number of frames.
        answered: The number of answered questions by number of frames.
        total: The number of questions.

    Returns:
        The table: the accuracy in percent, its 95 % interval, the numbers of right answers and of answered questions.
    """
    head = f"{'frames':>6}  {'accuracy':>8}  {'95 % interval':>14}  {'right':>11}  {'answered':>11}"
    lines = [head, "-" * len(head)]
    for count, done in answered.items():
        of_all = f"{done}/{total}"
        f = metrics.get(count)
        if f is None or not f["total"]:
            lines.append(f"{count:>6}  {'-':>8}  {'-':>14}  {'-':>11}  {of_all:>11}")
            continue
        interval = f"{100 * f['low']:.2f} - {100 * f['high']:.2f}"
        right = f"{f['correct']}/{f['total']}"
        lines.append(f"{count:>6}  {100 * f['accuracy']:>8.2f}  {interval:>14}  {right:>11}  {of_all:>11}")
    return "\n".join(lines)


def submit(url: str, answers: Answers) -> str:
    """Send the answers to a server as JSON, in one POST request.

    Args:
        url: The address of the server.
        answers: The chosen options by q_uid.

    Returns:
        The reply of the server.

    Raises:
        UserError: The request fails.
    """
    body = json.dumps(answers).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            return reply.read(_SHOWN_REPLY).decode("utf-8", errors="replace").strip()
    except urllib.error.HTTPError as e:
        said = " ".join(e.read(200).decode("utf-8", errors="replace").split())
        reason = f"it answered {e.code} {e.reason}" + (f": {said}" if said else "")
    except (OSError, ValueError) as e:
        reason = str(getattr(e, "reason", e))
    raise UserError(f"--submit: sending to {url} failed ({reason}); the files are written, send them by hand")
