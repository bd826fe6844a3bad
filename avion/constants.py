"""Constants that several rooms need. A leaf: this module imports nothing of the project.

Means and standard deviations are per RGB channel on the 0-255 scale.
"""

from typing import NamedTuple

EK100_VERBS, EK100_NOUNS = 97, 300  # classes of EPIC-KITCHENS-100

EGOMCQ_INTRA, EGOMCQ_INTER = 1, 2  # types of EgoMCQ's questions: five clips of one video, clips of five videos

# The choices of flags stand here, so that `--help` can name them without importing what they choose from.
OPTIMIZERS = ("adamw", "sgd")
VIDEO_SAMPLINGS = ("uniform", "prefix", "prefix-hold")  # frames of a whole video of EgoSchema
FEATURE_KINDS = ("clip", "frame", "spatial")
FEATURE_FORMATS = ("npz", "safetensors", "npy", "pt")  # the last two hold one array, for a file per video
ZERO_SHOT = ("ek100_mir", "ek100_cls", "egtea", "charades_ego", "egomcq", "retrieval")  # benchmarks
SHARD_DTYPES = ("fp32", "fp16", "bf16")


class Normalization(NamedTuple):
    """The mean and the standard deviation by which clips are normalised, per RGB channel on the 0-255 scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CLIP_STD = (68.5005327, 66.6321579, 70.3231631)

NORM_STYLES: dict[str, Normalization] = {
    # CLIP's own statistics, with which Video Mamba Suite trains.
    "openai": Normalization((122.7709383, 116.7460125, 104.0937362), _CLIP_STD),
    # AVION's and LaViLa's checkpoints were trained with this mistyped red mean, and need it.
    "openai_legacy": Normalization((108.3272985, 116.7460125, 104.0937362), _CLIP_STD),
    # The statistics of ImageNet, as timm uses them.
    "timm": Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

# A run that goes on from a checkpoint is another run than before if one of these flags has changed: they say which
# clips there are, what the model sees of them, which model it is, and what it began from. These are the values of
# --allow-changes.
OTHER_RUN = (
    "batch-size", "clip-length", "clip-stride", "dataset", "frame-sampling", "lock-except", "lock-text",
    "lock-video", "model-args", "pretrain-model", "pretrain-path", "pretrain-zoo", "seed", "train-metadata",
    "val-metadata",
)  # fmt: skip
