"""What the scripts of AVION and Video Mamba Suite know and this project does not, each with where to go.

A leaf: imports nothing of the project. docs/compatibility.md has the same list.
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
    """Where a model of this name is, if it is one of upstream's that is not here."""
    return _answer(_MODELS, name)


def program_elsewhere(name: str) -> str | None:
    """Where a script of this name is, if it is one of upstream's that is not here."""
    return _answer(_PROGRAMS, name)


def flag_elsewhere(name: str) -> str | None:
    """What does the work of a flag of upstream's that is not here."""
    answer = _FLAGS.get(name)
    return None if answer is None else f"{answer}; {_PAGE}"


def value_elsewhere(flag: str, value: str) -> str | None:
    """Where the value of a flag is, if it is one of upstream's that is not here."""
    answer = _VALUES.get((flag, value))
    return None if answer is None else f"{answer}; {_PAGE}"


def _answer(patterns: dict[str, str], name: str) -> str | None:
    for pattern, answer in patterns.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return f"{answer}; {_PAGE}"
    return None
