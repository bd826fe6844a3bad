"""Make the files that the EPIC-KITCHENS-100 challenge servers take, from predictions; nothing is sent.

Examples:
    python tools/make_submission.py actions predictions.pkl actions.zip --clips EPIC_100_test_timestamps.csv
    python tools/make_submission.py retrieval similarity.npy EPIC_100_retrieval_test.csv \\
        EPIC_100_retrieval_test_sentence.csv retrieval.zip

The tool checks shapes, ids and ranges first, and writes a complete zip file or none.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avion.data.ek100 import check_ids_differ, read_ek100_retrieval, read_sentences
from avion.data.ek100_actions import read_ek100_actions
from avion.engine.args import ToolParser
from avion.engine.predictions import action_zip, retrieval_zip, write_whole
from avion.errors import UserError, exit_status, say
from avion.evaluation.submission import SLS, SLS_LEVELS, action_submission, check_same_ids, retrieval_submission
from avion.numbers import whole
from avion.reading import open_file, read_npy
from avion.safe_pickle import load_pickle
from avion.targets import check_target

_LEVELS = {"sls_pt": (2, "of pretraining"), "sls_tl": (3, "training labels"), "sls_td": (3, "training data")}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/make_submission.py", doc=__doc__)
    shared = ToolParser(add_help=False)
    for name in SLS:
        default, what = _LEVELS[name]
        shared.add_argument(
            "--" + name.replace("_", "-"),
            type=whole(0, 5),
            default=default,
            choices=SLS_LEVELS,
            metavar="0-5",
            help=f"supervision that the submission declares: {what} [{default}]",
        )
    shared.add_argument("--overwrite", action="store_true", help="replace an existing output")
    shared.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    tasks = parser.add_subparsers(dest="task", required=True)

    actions = tasks.add_parser("actions", parents=[shared], help="action recognition: a zip of test.json")
    actions.add_argument("predictions", help="file that main_finetune_classification.py --pickle-filename wrote")
    actions.add_argument("output", help="zip file that is written")
    actions.add_argument(
        "--clips", metavar="CSV", help="annotations of the split, whose ids must be those of the predictions"
    )

    retrieval = tasks.add_parser("retrieval", parents=[shared], help="multi-instance retrieval: a zip of test.pkl")
    retrieval.add_argument("similarity", help="matrix of clips x sentences with (cosine + 1) / 2, as .npy or .pkl")
    retrieval.add_argument("clips", help="CSV of the clips, in the order of the matrix's rows")
    retrieval.add_argument("sentences", help="CSV of the sentences, in the order of the matrix's columns")
    retrieval.add_argument("output", help="zip file that is written")
    return parser


def make_actions(args: argparse.Namespace) -> str:
    """Write the zip file for action recognition.

    Args:
        args: The parsed flags.

    Returns:
        What was done, for the screen.

    Raises:
        UserError: The predictions cannot be read or do not fit the annotations, or the file cannot be written.
    """
    content = load_pickle(args.predictions, "predictions")
    wanted = ("narration_id", "verb_output", "noun_output")
    if not isinstance(content, dict) or any(name not in content for name in wanted):
        raise UserError(
            f"predictions {args.predictions}: a dict with {', '.join(wanted)} is required, "
            "as --pickle-filename writes it"
        )
    ids = _ids(content["narration_id"], args.predictions)
    try:
        submission = action_submission(ids, content["verb_output"], content["noun_output"], _sls(args))
    except UserError as error:
        raise UserError(f"predictions {args.predictions}: {error}") from error
    if args.clips is not None:
        check_same_ids(ids, list(read_ek100_actions(args.clips).narration_ids), f"predictions {args.predictions}")
    write_whole(args.output, action_zip(submission), "output")
    return f"{args.output}: test.json for {len(ids)} clips"


def _ids(column: Any, path: str) -> list[Any]:
    if not isinstance(column, (list, tuple, np.ndarray)) or (isinstance(column, np.ndarray) and column.ndim != 1):
        raise UserError(f"predictions {path}: narration_id is no list of ids")
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def make_retrieval(args: argparse.Namespace) -> str:
    """Write the zip file for retrieval.

    Args:
        args: The parsed flags.

    Returns:
        What was done, for the screen.

    Raises:
        UserError: The similarities cannot be read or do not fit the annotations, or the file cannot be written.
    """
    similarity = read_matrix(args.similarity)
    clips = list(read_ek100_retrieval(args.clips).narration_ids)
    check_ids_differ(clips, f"annotations {args.clips}")
    sentences, _ = read_sentences(args.sentences)
    try:
        submission = retrieval_submission(similarity, clips, sentences, _sls(args))
    except UserError as error:
        raise UserError(f"similarity {args.similarity}: {error}") from error
    write_whole(args.output, retrieval_zip(submission), "output")
    return f"{args.output}: test.pkl for {len(clips)} clips and {len(sentences)} sentences"


def read_matrix(path: str) -> np.ndarray:
    """Read a matrix of similarities.

    Args:
        path: A .npy file, or a pickle.

    Returns:
        The matrix (clips, sentences).

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    if Path(path).suffix != ".npy":
        matrix = load_pickle(path, "similarity")
    else:
        try:
            with open_file(path) as file:
                matrix = read_npy(file, os.fstat(file.fileno()).st_size)
        except FileNotFoundError:
            raise UserError(f"similarity {path}: no such file") from None
        except (OSError, ValueError, EOFError, MemoryError) as error:
            cause = " ".join(str(error).split())[:120]
            raise UserError(f"similarity {path}: is not a .npy of plain numbers, or cut short ({cause})") from error
    if not isinstance(matrix, np.ndarray):
        raise UserError(f"similarity {path}: holds a {type(matrix).__name__}, not a matrix of clips x sentences")
    return matrix


def _sls(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in SLS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)

    def body() -> None:
        inputs = [value for name, value in vars(args).items() if name != "output" and isinstance(value, str)]
        check_target(args.output, "output", suffix=".zip", overwrite=args.overwrite, inputs=inputs, make_folder=True)
        say({"actions": make_actions, "retrieval": make_retrieval}[args.task](args))

    return exit_status("tools/make_submission.py", body, debug=args.debug)
