"""Extract features of any list of videos with any checkpoint, into .npz or safetensors shards.

Examples:
    python tools/extract_features.py --checkpoint runs/id6/checkpoint.pt --videos list.txt --root videos/ \\
        --frames 16 --features clip frame spatial --dtype fp16 --output-dir features/
    python tools/extract_features.py --checkpoint runs/id6/checkpoint.pt --videos EPIC_100_retrieval_test.csv \\
        --root datasets/EK100/EK100_320p_15sec/ --format safetensors --output-dir features/

The same command continues after the finished shards. Exit status: 0 success, 1 some videos cannot be read
(they are listed and left out), 2 a mistake in the flags or files.
"""

from collections.abc import Sequence

from avion.engine.options.features import FeatureOptions
from avion.engine.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    errors: dict[int, str] = {}

    def body(options: FeatureOptions) -> None:
        from avion.engine.console import setup_logging
        from avion.engine.distributed import World
        from avion.engine.features import extract_features

        setup_logging(World())
        errors.update(extract_features(options))
        for row, error in errors.items():
            print(f"unreadable  row {row}: {error}")
        print(f"{options.output_dir}: {'all rows are there' if not errors else f'{len(errors)} rows are left out'}")

    status = run_program(body, FeatureOptions, argv, "tools/extract_features.py", __doc__)
    return 1 if status == 0 and errors else status
