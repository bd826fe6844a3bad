"""Show, run or submit to SLURM the command behind a row of the paper's tables, or evaluate the released weights.

Examples:
    python tools/reproduce.py --table 8 --row 7                    # shows the command and what is missing
    python tools/reproduce.py --table 8 --row 7 --run
    python tools/reproduce.py --table 9 --row 6 --task actions --run --with-prerequisites --gpus 4
    python tools/reproduce.py --table 8 --from-released --run      # every row with released weights
    python tools/reproduce.py --figure 5 --scale demo --run --with-prerequisites --runs runs/tables_demo
    python tools/reproduce.py --table 8 --row 6 --run -- --workers 16 --tensorboard    # more flags of main_pretrain.py
    python tools/reproduce.py --table 9 --submit --with-prerequisites --partition gpu --timeout 720 --dry-run

With --submit, the job options of slurm/submit.py are accepted too (python slurm/submit.py --help).
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence

from avion.engine.args import ToolParser, parse
from avion.engine.submit import SubmitOptions, submit
from avion.engine.yaml_files import unknown_key
from avion.errors import UserError, exit_status, say
from avion.numbers import PROCESSES, SEED, whole
from avion.reproduce.plan import Request, Step, plan
from avion.reproduce.recipe import FULL, TASKS, Recipe, load_recipes
from avion.reproduce.show import described, recipes_table
from avion.targets import check_here

logger = logging.getLogger(__name__)
NAME = "tools/reproduce.py"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/reproduce.py", doc=__doc__, allow_abbrev=False)
    which = parser.add_argument_group("which")
    which.add_argument(
        "--table", metavar="N", help="table of the paper: 8, 9, 10, avion for AVION's baseline, or zeroshot"
    )
    which.add_argument("--figure", type=whole(1, 99), metavar="N", help="figure of the paper: 5")
    which.add_argument("--row", type=whole(1, 99), metavar="ID", help="the paper's ID of a row, 4 to 8 [every row]")
    which.add_argument("--task", choices=TASKS, help="task, where a row has several tasks [every task]")
    which.add_argument("--recipe", nargs="+", metavar="KEY", help="recipes by the names of their files")
    what = parser.add_argument_group("what to do (default: show the commands)").add_mutually_exclusive_group()
    what.add_argument(
        "--run", action="store_true", help="run the recipes on this machine, one after the other, or continue them"
    )
    what.add_argument("--submit", action="store_true", help="submit the recipes to SLURM")
    what.add_argument("--list", action="store_true", help="print all recipes as a Markdown table")
    what.add_argument("--mark", action="store_true", help="write only recipe.json, for runs that were started by hand")
    how = parser.add_argument_group("how")
    how.add_argument("--from-released", action="store_true", help="only evaluate the released weights")
    how.add_argument("--checkpoint", metavar="FILE", help="file (or hf: address) of the released weights")
    how.add_argument(
        "--with-prerequisites",
        action="store_true",
        help="first run the recipes whose checkpoints the chosen recipes start from",
    )
    how.add_argument("--again", action="store_true", help="set finished runs aside and run the recipes again")
    how.add_argument(
        "--seed",
        type=SEED,
        nargs="+",
        default=[],
        metavar="N",
        help="seeds of the recipes; each seed gets a run of its own",
    )
    how.add_argument(
        "--gpus",
        type=PROCESSES,
        metavar="N",
        help="number of processes; the global batch stays the same [as in the recipe]",
    )
    how.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="device of the runs [auto]")
    how.add_argument(
        "--scale",
        default=FULL,
        help=f"scale of the runs: {FULL}, demo (recipes/scales/demo.yaml) or a YAML file [{FULL}]",
    )
    how.add_argument(
        "--data-on-nodes",
        action="store_true",
        help="with --submit: submit the jobs although this machine does not see all files, because the nodes see them",
    )
    how.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds the runs [%(default)s]")
    return parser


def selected(args: argparse.Namespace) -> list[Recipe]:
    """Find the recipes that --table, --figure, --row, --task and --recipe name.

    Args:
        args: The parsed flags.

    Returns:
        The recipes.

    Raises:
        UserError: There is no such recipe.
    """
    if [args.table, args.figure, args.recipe].count(None) != 2:
        raise UserError("give one of --table (8, 9, 10, avion, zeroshot), --figure (5) and --recipe")
    if args.recipe is not None:
        return _by_key(args.recipe)
    table = int(args.table) if args.table is not None and args.table.isdigit() else args.table
    place = load_recipes(table=table, figure=args.figure)
    found = [r for r in place if args.row in (None, r.row) and args.task in (None, r.task)]
    if found:
        return found
    if place:
        rows = "; ".join(f"--row {r.row} --task {r.task!r}" for r in place)
        raise UserError(f"no recipe for this row and task; there are {rows}")
    tables = sorted({str(r.table) for r in load_recipes() if r.table is not None})
    raise UserError(f"no recipes for it; there are tables {', '.join(tables)} and figure 5")


def _by_key(keys: Sequence[str]) -> list[Recipe]:
    known = {recipe.key: recipe for recipe in load_recipes()}
    for key in keys:
        if key not in known:
            raise unknown_key("--recipe", key, known, f"there are {', '.join(known)}")
    return [known[key] for key in keys]


def run_all(steps: Sequence[Step], again: bool) -> int:
    """Run the recipes that are not done, one after the other.

    Args:
        steps: The runs.
        again: Whether finished runs are set aside and run again.

    Returns:
        0, or the first exit status that is not 0, with which the function ends.
    """
    for number, step in enumerate(steps, 1):
        key = step.run.recipe.key
        if step.done:
            logger.info("%d of %d: %s is done (%s)", number, len(steps), key, step.run.folder)
            step.run.mark()
            continue
        if again:
            step.run.put_aside()
        logger.info("%d of %d: %s", number, len(steps), key)
        status = step.run.execute()
        if status != 0:
            logger.error("%s ended with status %d; the same command goes on with it", key, status)
            return status
    return 0


def submit_all(steps: Sequence[Step], options: SubmitOptions, again: bool) -> int:
    """Submit a job for each run that is not done; a job waits for the jobs of the runs that it starts from."""
    jobs: dict[str, str] = {}
    for step in steps:
        run, folder = step.run, str(step.run.folder)
        if step.done:
            logger.info("%s is done (%s)", run.recipe.key, folder)
            continue
        if again and not options.dry_run:
            run.put_aside()
        after = [jobs[str(before.run.folder)] for before in step.needs if str(before.run.folder) in jobs]
        waiting = {"dependency": ",".join(filter(None, [options.dependency, *(f"afterok:{job}" for job in after)]))}
        job = submit(run.recipe.entry_point, run.recipe.words(), for_processes(options, run.recipe.gpus, waiting))
        jobs[folder] = job or f"(job of {run.recipe.key})"
        if job:
            run.mark()
            say(f"{run.recipe.key}: submitted as job {job}")
    return 0


def for_processes(options: SubmitOptions, count: int, changes: dict[str, str]) -> SubmitOptions:
    """Change the job options to another number of processes. Options of CPUs (--ngpus 0) stay without GPUs.

    Args:
        options: The job options.
        count: The number of processes.
        changes: Further changes.

    Returns:
        The changed options.

    Raises:
        UserError: The processes cannot be divided evenly among the nodes.
    """
    per_node, rest = divmod(count, options.nodes)
    if rest:
        raise UserError(f"--nodes {options.nodes}: {count} processes do not divide among them; give --gpus too")
    where = {"tasks_per_node": per_node} if options.ngpus == 0 else {"ngpus": per_node, "tasks_per_node": 0}
    return dataclasses.replace(options, **where, **changes)


def processes(args: argparse.Namespace, options: SubmitOptions | None) -> int | None:
    """Return the number of processes of each run: --gpus, or that of the job, or None for that of the recipe."""
    if args.gpus is None and options is not None and {"ngpus", "tasks_per_node"} & options.given():
        return options.nodes * options.processes
    return args.gpus


def job_options(args: argparse.Namespace, words: Sequence[str]) -> SubmitOptions | None:
    """Parse the job options of --submit.

    Args:
        args: The parsed flags.
        words: The words that the parser of this tool does not know.

    Returns:
        The job options; None without --submit.

    Raises:
        UserError: A word is unknown.
    """
    if args.submit:
        options = parse(SubmitOptions, words, NAME, "")
        return dataclasses.replace(options, ngpus=0) if args.device == "cpu" else options
    if words:
        raise UserError(f"unknown flag {words[0]}: see --help; flags of the entry points stand after `--`")
    return None


def check_complete(steps: Sequence[Step], args: argparse.Namespace, options: SubmitOptions | None) -> None:
    """Refuse to start where something is missing. A dry run warns: a login node need not see what the nodes see."""
    lacking = [step for step in steps if step.missing]
    if options is not None and (options.dry_run or args.data_on_nodes):
        for problem in dict.fromkeys(str(problem) for step in lacking for problem in step.missing):
            logger.warning("not seen from this machine: %s", problem)
        return
    if lacking:
        print("\n\n".join(described(step) for step in lacking))
        count = len({str(problem) for step in lacking for problem in step.missing})
        elsewhere = "" if options is None else "; files that only the nodes see: --data-on-nodes"
        raise UserError(
            f"nothing was started: {count} thing{'s' * (count > 1)} missing, listed above with the cure{elsewhere}"
        )


def reproduce(args: argparse.Namespace, options: SubmitOptions | None, words: Sequence[str]) -> int:
    """Do what the flags ask for; return the exit status."""
    if args.list:
        print(recipes_table(load_recipes()))
        return 0
    check_here(args.runs, "--runs")
    if args.checkpoint and not args.from_released:
        raise UserError("--checkpoint: goes with --from-released; to start from it, give `-- --pretrain-model FILE`")
    request = Request(
        runs=args.runs,
        scale=args.scale,
        seeds=tuple(args.seed) or (None,),
        gpus=processes(args, options),
        device=args.device,
        released=args.from_released,
        checkpoint=args.checkpoint,
        words=tuple(words),
        plugins=tuple(args.plugins),
        with_prerequisites=args.with_prerequisites,
        again=args.again,
        here=not args.submit,
        nodes=1 if options is None else options.nodes,
    )
    steps = plan(selected(args), request)
    if args.mark:
        for step in steps:
            step.run.mark()
        return 0
    if not (args.run or args.submit):
        print("\n\n".join(described(step) for step in steps))
        return 0
    check_complete(steps, args, options)
    if options is not None:
        return submit_all(steps, options, args.again)
    return run_all(steps, args.again)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, unknown = build_parser().parse_known_args(words[:split])

    from avion.engine.console import setup_logging
    from avion.engine.distributed import World

    setup_logging(World())
    return exit_status(NAME, lambda: reproduce(args, job_options(args, unknown), words[split + 1 :]))
