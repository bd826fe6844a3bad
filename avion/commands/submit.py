"""Submit an entry point to SLURM through submitit.

    python slurm/submit.py main_pretrain.py --ngpus 8 --nodes 2 --partition gpu -- --model TIMEMAMBA_VITB16 \\
        --output-dir runs/id6

The options of the job stand before `--`, the flags of the entry point after it. --dry-run shows the job without
submitting it.
"""

import sys
from collections.abc import Sequence

from avion.engine.args import parse
from avion.engine.submit import ENTRY_POINTS, SubmitOptions, submit
from avion.errors import UserError, called_names, exit_status

_NAME = "slurm/submit.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status, 2 for a mistake in them."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    mine, theirs = words[:end], words[end + 1 :]

    def body() -> None:
        usage = f"{called_names(_NAME)} ENTRY_POINT [job options] -- [flags of the entry point]"
        if not mine or mine[0].startswith("-"):
            if mine[:1] not in (["-h"], ["--help"]):
                raise UserError(f"the entry point comes first ({', '.join(ENTRY_POINTS)}): {usage}")
            options = parse(SubmitOptions, mine, usage, __doc__.splitlines()[0])
        options = parse(SubmitOptions, mine[1:], _NAME, __doc__.splitlines()[0])
        job = submit(mine[0], theirs, options)
        if job:
            print(f"submitted as job {job}")

    return exit_status(_NAME, body)
