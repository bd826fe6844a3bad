"""Names of AVION's and Video Mamba Suite's scripts that this project does not have, each with the place where it is.

A leaf: this module imports nothing of the project. docs/compatibility.md has the same list.
"""

import re

_VMS = "github.com/OpenGVLab/video-mamba-suite has it"
_AVION = "github.com/zhaoyue-zephyrus/AVION has it"
_PAGE = "docs/compatibility.md says what is not here"

# Patterns of the names of models, and the answer to them.
_MODELS = {
    r"clip_vivim_\w+|vivim\w*": f"Video Mamba Suite's ViViM is not here; {_VMS}",
    r"clip_vit[ts]16": f"Video Mamba Suite's ViT-T and ViT-S are not here; {_VMS}",
    r"clip_timesformert16": f"it is not here; TIMESFORMER_VITT16 has the same video tower; {_VMS}",
    r"clip_timesformerl14": "it is not here; TIMESFORMER_VITL14 has the same video tower, and a text tower of 12 "
    f"heads, upstream's has 8; {_VMS}",
    r"deit\w*": f"DeiT's models are not here; {_VMS}",
    r"\w*videomae\w*|pretrain_vit\w*": f"AVION's VideoMAE is not here; {_AVION}",
}  # fmt: skip
_FLAGS = {
    "--nodelist": "sbatch chooses nodes by name: sbatch --nodelist=NODES slurm/pretrain.sbatch FLAGS; slurm/submit.py "
    "has --constraint and --partition",
}  # fmt: skip
_VALUES = {
    ("--pretrain-zoo", "deit"): "DeiT's weights are those that Video Mamba Suite's ViT-T and ViT-S start from, which "
    f"are not here; {_VMS}",
}  # fmt: skip
_PROGRAMS = {r"(main_)?videomae\w*(\.py)?": f"AVION's VideoMAE is not here; {_AVION}"}


def model_elsewhere(name: str) -> str | None:
    """Say where a model of upstream's that is not here can be found.

    Args:
        name: The name of a model, in any spelling of upstream's.

    Returns:
        The answer for a message; None where upstream has no such model either.
    """
    return _answer(_MODELS, name)


def program_elsewhere(name: str) -> str | None:
    """Say where a script of upstream's that is not here can be found.

    Args:
        name: The name of a script, with or without .py.

    Returns:
        The answer for a message; None where upstream has no such script either.
    """
    return _answer(_PROGRAMS, name)


def flag_elsewhere(name: str) -> str | None:
    """Say what does the work of a flag of upstream's that is not here.

    Args:
        name: The flag, with its dashes.

    Returns:
        The answer for a message; None where upstream has no such flag either.
    """
    answer = _FLAGS.get(name)
    return None if answer is None else f"{answer}; {_PAGE}"


def value_elsewhere(flag: str, value: str) -> str | None:
    """Say where the value of a flag of upstream's that is not here can be found.

    Args:
        flag: The flag, with its dashes.
        value: The value of the flag.

    Returns:
        The answer for a message; None where upstream has no such value either.
    """
    answer = _VALUES.get((flag, value))
    return None if answer is None else f"{answer}; {_PAGE}"


def _answer(patterns: dict[str, str], name: str) -> str | None:
    for pattern, answer in patterns.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return f"{answer}; {_PAGE}"
    return None
