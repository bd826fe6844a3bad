"""`--dataset demo`: the embedded demo dataset in the place of files that were not given."""

import dataclasses
from typing import TypeVar

from avion.data.demo import ensure_demo_dataset

from .options import EgoSchemaOptions, TrainingOptions

T = TypeVar("T", bound=TrainingOptions | EgoSchemaOptions)


def on_demo_dataset(options: T, root: str, **files: str) -> T:
    """The same options with the paths of the demo dataset, which is generated where it is missing.

    Args:
        options: The options of a task. `--root`, where it was given, is the folder of the demo dataset.
        root: The attribute of `DemoPaths` that becomes `--root`.
        files: By the name of a flag, the attribute of `DemoPaths` that it becomes unless it was given.
    """
    paths = ensure_demo_dataset(options.root if options.was_given("root") else "datasets/demo")
    attributes = {"root": root} | {name: value for name, value in files.items() if not options.was_given(name)}
    return dataclasses.replace(options, **{name: str(getattr(paths, a)) for name, a in attributes.items()})
