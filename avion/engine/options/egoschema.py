"""The flags of `main_egoschema.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import VIDEO_SAMPLINGS
from avion.engine.args import flag, other_default
from avion.numbers import whole

from .shared import FRAMES, DeviceOptions, RunOptions, SavedModelOptions, VideoOptions

# The server that EgoSchema's own repository names. It answers with the accuracy over all questions.
SUBMISSION_URL = "https://validation-server.onrender.com/api/upload/"


@dataclass(frozen=True)
class EgoSchemaOptions(SavedModelOptions, DeviceOptions):
    """The options of `main_egoschema.py`."""

    TITLE: ClassVar[str] = "EgoSchema"
    REMOTE_OUTPUT: ClassVar[bool] = True

    dataset: str = flag("egoschema", "data; demo: the embedded demo dataset", choices=["egoschema", "demo"])
    root: str = flag("datasets/EgoSchema/videos/", "folder of the videos {q_uid}.mp4", metavar="DIR")
    questions: str = flag("datasets/EgoSchema/questions.json", "questions with their answer options", metavar="FILE")
    answers: str | None = flag(
        None, "public answers (subset_answers.json), from which the accuracy is computed", metavar="FILE"
    )
    frames: list[int] = flag(
        [],
        "frames per video [16]; several numbers give an accuracy each, from one decoding of the video",
        FRAMES,
        metavar="N",
    )
    sampling: str = flag(
        "uniform",
        "which frames of a video are read; uniform: the middles of equal segments; prefix: the first "
        "frames, or as uniform in a shorter video; prefix-hold: the first frames, then the last frame again and again",
        choices=list(VIDEO_SAMPLINGS),
    )
    prompt: list[str] = flag(
        [],
        "templates of the text of an answer option [Is it '{option}']; {option} is the option in lower case, "
        "{question} the question; the features of several templates are averaged",
        metavar="TEXT",
    )
    strict: bool = flag(False, "stop at the first video that cannot be read, instead of listing the video")

    uid_to_ego4d: str | None = flag(
        None, "uid_to_ego4d.json, which names the Ego4D video that each video comes from", metavar="FILE"
    )
    pretrain_metadata: list[str] = flag(
        [], "narrations that the model was pretrained on, to find common videos", metavar="FILE"
    )
    exclude_overlap: bool = flag(False, "leave questions about videos of the pretraining out of the accuracy")

    submit: bool = flag(
        False, "send the answers to the server of --submit-url once they are written; without this flag nothing is sent"
    )
    submit_url: str = flag(SUBMISSION_URL, "server that --submit sends the answers to", metavar="URL")

    pretrain_model: str = flag(
        "",
        "checkpoint of a pretrained or fine-tuned model: a path or hf:owner/repo/file",
        names=["--resume"],
        metavar="PATH",
    )
    max_tokens: int = flag(
        0, "patches that are computed at a time, which sets the memory; 0: chosen by the device", whole(0, 2**40)
    )

    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)

    output_dir: str = other_default(
        RunOptions,
        "output_dir",
        "./",
        "folder of answers, scores and log; scores that an earlier run left there are not computed again",
    )
    workers: int = other_default(
        RunOptions,
        "workers",
        2,
        "decoding processes per process; each of them holds up to two videos, 0.15 MB per frame",
    )
    data_timeout: float = other_default(RunOptions, "data_timeout", 900.0)
    print_freq: int = other_default(RunOptions, "print_freq", 10, "videos between progress lines")
    debug: bool = other_default(RunOptions, "debug", False)
