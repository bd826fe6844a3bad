"""The flags of `main_egoschema.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import VIDEO_SAMPLINGS
from avion.engine.args import flag, other_default
from avion.numbers import whole

from .model_args import settle_model_args
from .shared import FRAMES, DeviceOptions, ModelOptions, RunOptions, VideoOptions

# Of EgoSchema's own repository; answers the accuracy over all questions.
SUBMISSION_URL = "https://validation-server.onrender.com/api/upload/"


@dataclass
class EgoSchemaOptions(DeviceOptions):
    """`main_egoschema.py`."""

    TITLE: ClassVar[str] = "EgoSchema"

    dataset: str = flag("egoschema", "demo: the embedded demo dataset", choices=["egoschema", "demo"])
    root: str = flag("datasets/EgoSchema/videos/", "folder of the videos {q_uid}.mp4", metavar="DIR")
    questions: str = flag("datasets/EgoSchema/questions.json", "questions and their options", metavar="FILE")
    answers: str | None = flag(None, "public answers (subset_answers.json), for the accuracy", metavar="FILE")
    frames: list[int] = flag(
        [], "frames per video [16]; several give a figure each, from one decoding", FRAMES, metavar="N"
    )
    sampling: str = flag(
        "uniform", "uniform: the middles of as many equal segments of the video; prefix: its first frames, or as "
        "uniform where it has fewer; prefix-hold: its first frames, then the last one again",
        choices=list(VIDEO_SAMPLINGS),
    )  # fmt: skip
    prompt: list[str] = flag(
        [], "templates of an option's text [Is it '{option}'], with {option} in lower case and {question}; of several, "
        "the features are averaged", metavar="TEXT",
    )  # fmt: skip
    strict: bool = flag(False, "stop at the first video that cannot be read instead of listing it")

    uid_to_ego4d: str | None = flag(None, "uid_to_ego4d.json, which says where the videos come from", metavar="FILE")
    pretrain_metadata: list[str] = flag([], "narrations of the pretraining, to find common videos", metavar="FILE")
    exclude_overlap: bool = flag(False, "leave questions about pretraining videos out of the accuracy")

    submit: bool = flag(False, "send the answers to the server once they are written; nothing is sent otherwise")
    submit_url: str = flag(SUBMISSION_URL, "that server", metavar="URL")

    model: str | None = other_default(
        ModelOptions, "model", None, "registered model, where the checkpoint does not say"
    )
    model_args: list[str] = other_default(ModelOptions, "model_args", [])
    pretrain_model: str = flag(
        "", "checkpoint of the model, pretrained or fine-tuned: a path or hf:owner/repo/file", names=["--resume"],
        metavar="PATH",
    )  # fmt: skip
    use_fast_conv1: bool = other_default(ModelOptions, "use_fast_conv1", False)
    use_flash_attn: bool | None = other_default(ModelOptions, "use_flash_attn", None)
    scan_backend: str = other_default(ModelOptions, "scan_backend", "auto")
    max_tokens: int = flag(0, "patches in work at a time, which sets the memory; 0: by device", whole(0, 2**40))

    norm_style: str = other_default(VideoOptions, "norm_style", "openai")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)

    output_dir: str = other_default(
        RunOptions, "output_dir", "./", "where answers, scores and log go; what an earlier run left there is not "
        "computed again",
    )  # fmt: skip
    workers: int = other_default(
        RunOptions, "workers", 2, "decoding processes per process; each holds up to two videos, 0.15 MB per frame"
    )
    print_freq: int = other_default(RunOptions, "print_freq", 10, "videos between progress lines")
    debug: bool = other_default(RunOptions, "debug", False)

    settle = staticmethod(settle_model_args)
