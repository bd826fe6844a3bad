"""Options in which the embedded demo dataset takes the place of files that were not given."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from avion.data.demo import DemoPaths, ensure_demo_dataset

from .options import EgoSchemaOptions, TrainingOptions, ZeroShotOptions

T = TypeVar("T", bound=TrainingOptions | EgoSchemaOptions)
U = TypeVar("U", bound=TrainingOptions | EgoSchemaOptions | ZeroShotOptions)


def on_demo_dataset(options: T, root: str, **files: str) -> T:
    """Give options with `--dataset demo` the paths of the demo dataset, which is generated where it is missing.

    Args:
        options: The options of a task. `--root`, where it was given, is the folder of the demo dataset.
        root: The attribute of `DemoPaths` that becomes `--root`.
        files: By the name of a flag, the attribute of `DemoPaths` that the flag becomes unless it was given.

    Returns:
        The same options with these paths.
    """
    paths = ensure_demo_dataset(options.root if options.was_given("root") else "datasets/demo")
    return dataclasses.replace(with_demo_files(options, paths, files), root=str(getattr(paths, root)))


def with_demo_files(options: U, paths: DemoPaths, files: Mapping[str, str]) -> U:
    """Give options the files of the demo dataset.

    Args:
        options: The options of a run.
        paths: The files of the demo dataset.
        files: By the name of a flag, the attribute of `paths` that the flag becomes unless it was given.

    Returns:
        The same options with these files.
    """
    names = {name: attribute for name, attribute in files.items() if not options.was_given(name)}
    return dataclasses.replace(options, **{name: str(getattr(paths, attribute)) for name, attribute in names.items()})
