"""Extract features of videos and sentences with any checkpoint, of clips or of windows over whole videos.

Examples:
    python tools/extract_features.py --checkpoint runs/id6/checkpoint.pt --videos list.txt --root videos/ \\
        --frames 16 --features clip frame spatial --dtype fp16 --output-dir features/
    torchrun --nproc_per_node=8 tools/extract_features.py --checkpoint runs/id6/checkpoint.pt --root videos/ \\
        --window 2 --stride 1 --format npy --output-dir features/
    python tools/extract_features.py --checkpoint runs/id6/checkpoint.pt --texts queries.txt --output-dir features/

The same command continues after what is finished. Exit status: 0 success, 1 something cannot be read (it is listed,
and the rows keep their place), 2 a mistake in the flags or files.
"""

from collections.abc import Sequence

from avion.engine.options.features import FeatureOptions
from avion.engine.program import run_program
from avion.errors import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    errors: dict[str, str] = {}

    def body(options: FeatureOptions) -> None:
        from avion.engine.features import extract_features

        report = extract_features(options)
        errors.update(report.errors)
        if not report.is_main:
            return
        for what, error in errors.items():
            say(f"unreadable  {what}: {error}")
        unreadable = f", {len(errors)} with something that cannot be read" if errors else ""
        say(f"{options.output_dir}: {report.count} {report.unit}{unreadable}")

    status = run_program(body, FeatureOptions, argv, "tools/extract_features.py", __doc__)
    return 1 if status == 0 and errors else status
