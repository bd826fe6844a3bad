"""What a recipe needs and this machine may lack: data, weights, GPUs and packages, each with what to do about it."""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avion.data.ek100 import sentence_path
from avion.data.video import resolve_decoder
from avion.engine.options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
    SavedModelOptions,
    ZeroShotOptions,
)
from avion.errors import UserError
from avion.remote import is_remote

from .recipe import Recipe, TaskOptions

_EK100 = "github.com/epic-kitchens/epic-kitchens-100-annotations"
_CURES = {
    "videos": "docs/data.md says how videos are laid out; link the folder or give another one after `--`",
    "ego4d": "it comes with LaViLa (github.com/facebookresearch/LaViLa); docs/data.md says what is in it",
    "ek100": f"get it from {_EK100}",
    "relevancy": "python tools/build_relevancy.py makes it from the annotations",
    "egoschema": "get it from github.com/egoschema/EgoSchema",
    "egomcq": "it comes with EgoVLP (github.com/showlab/EgoVLP)",
    "benchmark": "docs/zeroshot.md says what is in it",
    "weights": "give the path of a checkpoint",
}  # fmt: skip
_PACKAGES = ("torch", "torchvision", "timm", "open_clip", "ftfy", "regex", "numpy", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Missing:
    """Something that is missing, and what to do about it."""

    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}"


def missing(recipe: Recipe, device: str = "auto", *, here: bool = True) -> list[Missing]:
    """Return all that this machine lacks for running the recipe, except the checkpoint of another recipe.

    Args:
        recipe: The recipe as it will be run.
        device: The device that the user asked for: auto, cpu or cuda.
        here: False if the recipe will run on another machine, whose GPUs and packages cannot be checked.
    """
    options = recipe.args()
    found = [*_packages(), *_gpus(recipe, device)] if here else []
    return [*found, *_data(options), *_weights(recipe, options, here)]


def _packages() -> Iterator[Missing]:
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            yield Missing(f"package {name}", "pip install -r requirements.txt")
    try:
        resolve_decoder("auto")
    except UserError as e:
        yield Missing("video decoder", str(e).removeprefix("decoder: "))


def _gpus(recipe: Recipe, device: str) -> Iterator[Missing]:
    import torch

    found = torch.cuda.device_count()
    # A recipe that is scaled down for a CPU runs on a CPU if there is no GPU.
    demo = recipe.flags.get("dataset") == "demo" or "demo-root" in recipe.flags
    optional = demo and device == "auto" and found == 0
    if device == "cpu" or optional or found >= recipe.gpus:
        return
    less = f"--gpus {found}, which keeps the batch, " if found else ""
    yield Missing(
        f"GPUs: {recipe.gpus} needed, {found} visible",
        f"{less}--submit for a SLURM cluster, or --device cpu (very slow)",
    )


# ---- data ------------------------------------------------------------------------------------


def _data(options: TaskOptions) -> Iterator[Missing]:
    if options.dataset == "demo" or (isinstance(options, ZeroShotOptions) and options.demo_root):
        return  # the demo dataset is made where it is missing
    for flag, path, kind in sorted(set(_paths(options)), key=lambda entry: entry[:2]):
        if is_remote(path):
            continue  # the run itself asks the place
        there = Path(path).is_dir() if kind == "videos" else Path(path).is_file()
        if not there:
            yield Missing(f"{'folder' if kind == 'videos' else 'file'} {path} ({flag})", _CURES[kind])


def _paths(options: TaskOptions) -> Iterator[tuple[str, str, str]]:
    """Yield (flag, path, kind) of every file and folder that the run reads; the kinds are the keys of `_CURES`."""
    if isinstance(options, EgoSchemaOptions):
        yield from _paths_of_egoschema(options)
    elif isinstance(options, ZeroShotOptions):
        for name in options.dataset:
            yield from _benchmark_paths(name, options)
    elif isinstance(options, PretrainOptions):
        yield from _paths_of_pretraining(options)
    elif isinstance(options, FinetuneRetrievalOptions):
        yield from _paths_of_retrieval(options)
    else:
        yield from _paths_of_actions(options)


def _paths_of_egoschema(options: EgoSchemaOptions) -> Iterator[tuple[str, str, str]]:
    yield "--root", options.root, "videos"
    yield "--questions", options.questions, "egoschema"
    if options.answers:
        yield "--answers", options.answers, "egoschema"


def _paths_of_pretraining(options: PretrainOptions) -> Iterator[tuple[str, str, str]]:
    from avion.engine.tasks.finetune_retrieval import relevancy_file

    yield "--root-val", options.root_val, "videos"
    if not options.evaluate:
        yield "--root", options.root, "videos"
        for path in (options.train_metadata, *options.train_metadata_aux):
            yield "--train-metadata", path, "ego4d"
    yield "--val-metadata", options.val_metadata, "ek100"
    yield "beside --val-metadata", str(sentence_path(options.val_metadata)), "ek100"
    yield "--relevancy-path", relevancy_file(options.relevancy_path, "test"), "relevancy"


def _paths_of_retrieval(options: FinetuneRetrievalOptions) -> Iterator[tuple[str, str, str]]:
    from avion.engine.tasks.finetune_retrieval import relevancy_file

    yield "--root", options.root, "videos"
    yield "--val-metadata", options.val_metadata, "ek100"
    yield "beside --val-metadata", str(sentence_path(options.val_metadata)), "ek100"
    yield "--relevancy-path", relevancy_file(options.relevancy_path, "test"), "relevancy"
    if not options.evaluate:
        yield "--train-metadata", options.train_metadata, "ek100"
        yield "beside --train-metadata", str(sentence_path(options.train_metadata)), "ek100"
        path = options.train_relevancy_path or relevancy_file(options.relevancy_path, "train")
        yield "--train-relevancy-path", path, "relevancy"


def _paths_of_actions(options: FinetuneClassificationOptions) -> Iterator[tuple[str, str, str]]:
    yield "--root", options.root, "videos"
    yield "--val-metadata", options.val_metadata, "ek100"
    if not options.evaluate or not options.action_metadata:  # a released classifier holds no list of its classes
        yield "--train-metadata", options.train_metadata, "ek100"


def _benchmark_paths(name: str, options: ZeroShotOptions) -> Iterator[tuple[str, str, str]]:
    """Yield what a benchmark of main_zeroshot.py reads."""
    folder = Path(options.ek100_annotations)
    split = folder / "retrieval_annotations"
    if name.startswith("ek100"):
        yield "--ek100-root", options.ek100_root, "videos"
    if name == "ek100_mir":
        for file in ("EPIC_100_retrieval_test.csv", "EPIC_100_retrieval_test_sentence.csv"):
            yield "--ek100-annotations", str(split / file), "ek100"
        relevancy = split / "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl"
        yield "--ek100-annotations", str(relevancy), "relevancy"
    elif name == "ek100_cls":
        for file in ("EPIC_100_train.csv", "EPIC_100_validation.csv"):
            yield "--ek100-annotations", str(folder / file), "ek100"
    elif name == "egomcq":
        yield "--egomcq-root", options.egomcq_root, "videos"
        yield "--egomcq-questions", options.egomcq_questions, "egomcq"
    elif name == "retrieval":
        yield "--retrieval-root", options.retrieval_root, "videos"
        yield "--retrieval-captions", options.retrieval_captions, "benchmark"
    else:
        short = name.removesuffix("_ego")
        yield f"--{short}-root", getattr(options, f"{short}_root"), "videos"
        for kind in ("split", "classes"):
            yield f"--{short}-{kind}", getattr(options, f"{short}_{kind}"), "benchmark"


# ---- weights ---------------------------------------------------------------------------------


def _weights(recipe: Recipe, options: TaskOptions, here: bool) -> Iterator[Missing]:
    from avion.weights.files import HF_PREFIX

    evaluates = not isinstance(options, SavedModelOptions) and options.evaluate
    if not isinstance(options, SavedModelOptions) and evaluates:
        source = options.resume
    else:
        source = options.pretrain_model
    if source and recipe.starts_from is None:
        if not source.startswith(HF_PREFIX):
            yield from _file(source)
        elif here:
            yield from _hub(source)
    if isinstance(options, PretrainOptions) and options.pretrain_zoo == "openai" and not (evaluates or source) and here:
        yield from [*_file(options.pretrain_path)] if options.pretrain_path else _openai(recipe)


def _file(path: str) -> Iterator[Missing]:
    if path.startswith(("http://", "https://")):
        yield Missing(f"weights {path}", "a page to download them from by hand; then give --checkpoint FILE")
    elif not is_remote(path) and not Path(path).is_file():
        yield Missing(f"weights {path}", _CURES["weights"])


def _hub(address: str) -> Iterator[Missing]:
    from avion.weights.files import HF_PREFIX

    owner, repo, *file = address.removeprefix(HF_PREFIX).split("/")
    problem = _hub_problem(f"{owner}/{repo}", ["/".join(file)])
    if problem:
        yield Missing(f"weights {address}", f"{problem}; download it elsewhere and give --checkpoint FILE")


def _openai(recipe: Recipe) -> Iterator[Missing]:
    from avion.models.registry import model_config
    from avion.weights.zoo import openai_files

    files = openai_files(model_config(recipe.model))
    problem = _hub_problem(*files) if files else None
    if files and problem:
        where = f"{files[0]} ({' or '.join(files[1])})"
        yield Missing(
            f"OpenAI's CLIP weights, {where}",
            f"{problem}; download them elsewhere and give --pretrain-path FILE after `--`",
        )


@functools.lru_cache
def hub_is_reachable() -> bool:
    import huggingface_hub as hub

    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception:  # requests' or httpx's, by the hub's version
        return False
    return True


def _hub_problem(repo: str, names: list[str]) -> str:
    """Why none of these files of a repository can be had; empty where one is in the cache or the hub answers."""
    import huggingface_hub as hub

    if any(isinstance(hub.try_to_load_from_cache(repo, name), str) for name in names):
        return ""
    if hub.constants.HF_HUB_OFFLINE:
        return "not in the hub's cache, and HF_HUB_OFFLINE is set"
    return "" if hub_is_reachable() else "not in the hub's cache, and the hub cannot be reached"
