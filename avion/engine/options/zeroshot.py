"""The flags of `main_zeroshot.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import ZERO_SHOT
from avion.engine.args import flag, other_default
from avion.errors import UserError
from avion.numbers import COUNT, whole

from .shared import FRAMES, CaptionOptions, DeviceOptions, RunOptions, SavedModelOptions, VideoOptions

_EK100 = "datasets/EK100"
# Benchmarks in which a text is the name of a class, and benchmarks that read windows of a clip at a stride.
_OF_CLASSES, _STRIDED = ("ek100_cls", "egtea", "charades_ego"), ("egtea",)


@dataclass(frozen=True)
class ZeroShotOptions(SavedModelOptions, DeviceOptions):
    """The options of `main_zeroshot.py`."""

    TITLE: ClassVar[str] = "zero-shot evaluation"
    REMOTE_OUTPUT: ClassVar[bool] = True

    dataset: list[str] = flag([], "benchmarks to run, one after the other", choices=list(ZERO_SHOT))
    pretrain_model: str = flag(
        "",
        "checkpoint of a pretrained or fine-tuned model: a path or hf:owner/repo/file",
        names=["--resume"],
        metavar="PATH",
    )
    demo_root: str = flag(
        "",
        "folder of the embedded demo dataset, which is made where it is missing; all files that are not given are "
        "the demo dataset's",
        metavar="DIR",
    )

    ek100_root: str = flag(f"{_EK100}/EK100_320p_15sec/", "folder of the videos of EPIC-KITCHENS-100", metavar="DIR")
    ek100_annotations: str = flag(
        f"{_EK100}/epic-kitchens-100-annotations",
        "folder of the annotations of EPIC-KITCHENS-100: the CSVs, and "
        "retrieval_annotations with the retrieval split and its relevancy",
        metavar="DIR",
    )
    egtea_root: str = flag("datasets/EGTEA/cropped_clips/", "folder of the trimmed clips of EGTEA", metavar="DIR")
    egtea_split: str = flag("datasets/EGTEA/test_split1.txt", "clips of EGTEA to classify", metavar="FILE")
    egtea_classes: str = flag("datasets/EGTEA/action_idx.txt", "classes of EGTEA", metavar="FILE")
    charades_root: str = flag("datasets/CharadesEgo/videos/", "folder of the videos of Charades-Ego", metavar="DIR")
    charades_split: str = flag(
        "datasets/CharadesEgo/CharadesEgo_v1_test_only1st.csv", "videos of Charades-Ego to classify", metavar="FILE"
    )
    charades_classes: str = flag(
        "datasets/CharadesEgo/Charades_v1_classes.txt", "classes of Charades-Ego", metavar="FILE"
    )
    egomcq_root: str = flag("datasets/Ego4D/videos_320px_15sec/", "folder of the videos of Ego4D", metavar="DIR")
    egomcq_questions: str = flag("datasets/Ego4D/egomcq.json", "questions of EgoMCQ", metavar="FILE")
    retrieval_root: str = flag("", "folder of the videos of --retrieval-captions", metavar="DIR")
    retrieval_captions: str = flag(
        "",
        "clips with captions for text-to-video retrieval: a .csv, .jsonl, .json, .parquet or .pkl file (docs/data.md)",
        metavar="FILE",
    )
    caption_columns: list[str] = other_default(CaptionOptions, "caption_columns", [])

    clip_length: int | None = flag(
        None,
        "frames per clip [4 for ek100_mir and egomcq, 16 for classes, those of the checkpoint for retrieval]",
        FRAMES,
    )
    clip_stride: int | None = flag(None, "distance between the frames of egtea, in frames of the video [2]", FRAMES)
    num_clips: int | None = flag(None, "windows per clip [10 for egtea, 1 for the others]", whole(1, 1000))
    num_crops: int | None = flag(
        None, "crops per window along the longer side [3 for egtea, 1 for the others]", choices=[1, 3]
    )
    templates: list[str] = flag(
        [],
        "texts of a class, in which {} is the name of the class [{}]; the features of several texts are averaged. "
        "LaViLa's templates of Ego4D are '#C C {}' '#C {}'",
        metavar="TEXT",
    )
    egomcq_cosine: bool = flag(
        False, "compare features of length 1 in egomcq, in the place of the features as the model gives them"
    )

    output_dir: str = other_default(
        RunOptions,
        "output_dir",
        "./",
        "folder of metrics, predictions, features and log; features that an earlier "
        "run left there are not computed again",
    )
    batch_size: int = flag(32, "windows and crops of clips per forward pass", COUNT)
    workers: int = other_default(RunOptions, "workers", 8, "data-loading processes per process")
    data_timeout: float = other_default(RunOptions, "data_timeout", 900.0)
    print_freq: int = other_default(RunOptions, "print_freq", 10, "batches between progress lines")
    strict_data: bool = other_default(VideoOptions, "strict_data", False, "stop at the first clip that cannot be read")
    video_chunk_length: int = other_default(VideoOptions, "video_chunk_length", 15)
    video_layout: str = other_default(VideoOptions, "video_layout", "auto")
    video_index: str = other_default(VideoOptions, "video_index", "auto")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)
    debug: bool = other_default(RunOptions, "debug", False)

    def check(self) -> None:
        """Raise UserError for a flag that no chosen benchmark reads, and where a benchmark lacks its files."""
        readers = {
            "clip_stride": _STRIDED,
            "templates": _OF_CLASSES,
            "egomcq_cosine": ("egomcq",),
            "caption_columns": ("retrieval",),
        }
        for name, own in readers.items():
            if self.was_given(name) and self.dataset and not set(own) & set(self.dataset):
                *others, last = own
                who = f"{', '.join(others)} and {last} read" if others else f"{last} reads"
                raise UserError(f"--{name.replace('_', '-')}: only {who} it, which --dataset does not name")
        if "retrieval" in self.dataset and not self.demo_root:
            for name in ("retrieval_root", "retrieval_captions"):
                if not getattr(self, name):
                    raise UserError(f"--{name.replace('_', '-')}: not given; --dataset retrieval needs it")
