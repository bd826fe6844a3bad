"""`--dataset demo`: the embedded demo dataset in the place of files that were not named."""

from typing import Any

from avion.data.demo import ensure_demo_dataset


def use_demo_dataset(args: Any, root: str, **files: str) -> None:
    """Point flags at the demo dataset, which is generated where it is missing.

    root: which of `DemoPaths`' folders `--root` becomes; as given, `--root` says where the dataset lies. files: flag to
    the attribute of `DemoPaths` that it becomes, unless it was given.
    """
    paths = ensure_demo_dataset(args.root if "root" in args.given else "datasets/demo")
    args.root = str(getattr(paths, root))
    for name, attribute in files.items():
        if name not in args.given:
            setattr(args, name, str(getattr(paths, attribute)))
