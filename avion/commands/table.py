"""All programs in one table: the name after `avion`, and the file of a clone of the repository that runs the same
program.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        name: The word after `avion` that runs it.
        module: The module that has its `main`.
        file: The file that runs the same in a clone of the repository; empty if there is none.
        summary: What the program does, in a line.
        part: The command of the file that the program runs; empty for the whole file.
    """

    name: str
    module: str
    file: str
    summary: str
    part: str = ""

    @property
    def called(self) -> str:
        """What runs the same in a clone of the repository, as messages name it."""
        if not self.file:
            return f"python -m {self.module.removesuffix('.__main__')}"
        return f"{self.file} {self.part}".strip()

    def argv(self, words: Sequence[str]) -> list[str]:
        """Words of the command line behind its name, as the `main` of its module takes them."""
        return [self.part, *words] if self.part else list(words)


def _task(name: str, summary: str) -> Program:
    stem = name.replace("-", "_")
    return Program(name, f"avion.commands.{stem}", f"main_{stem}.py", summary)


def _tool(name: str, stem: str, summary: str, part: str = "") -> Program:
    return Program(name, f"avion.commands.{stem}", f"tools/{stem}.py", summary, part)


# In the order in which they are listed, by what they are for.
PROGRAMS: dict[str, tuple[Program, ...]] = {
    "train and evaluate": (
        _task("pretrain", "train a model on narrated clips and evaluate it on EPIC-Kitchens-100 retrieval"),
        _task("finetune-retrieval", "fine-tune a model on EPIC-Kitchens-100 retrieval"),
        _task("finetune-classification", "fine-tune a video tower on EPIC-Kitchens-100 action recognition"),
        _task("egoschema", "answer EgoSchema's questions about long videos"),
        _task("zeroshot", "evaluate a model on EK-100, EGTEA, Charades-Ego, EgoMCQ and captions, zero-shot"),
    ),
    "before a run": (
        _tool("doctor", "doctor", "say what this machine can run and what to do about the rest"),
        _tool("prepare", "prepare_videos", "make videos that training reads quickly from raw ones"),
        _tool("index-videos", "index_videos", "index the packets of videos for reading only what a clip needs"),
        _tool("check-data", "check_data", "check that the videos of annotations exist and can be decoded"),
        _tool("relevancy", "build_relevancy", "build or check the relevancy pickle of a retrieval split"),
        _tool("convert", "convert_checkpoint", "rewrite any readable checkpoint in this project's format"),
        Program("models", "avion.models.__main__", "", "list the models, or describe a checkpoint"),
    ),
    "after a run": (
        _tool("plot", "plot_run", "draw the curves of one or several runs"),
        _tool("features", "extract_features", "extract features of videos, in clips or windows, and of sentences"),
        _tool("index", "search_videos", "make the index that videos are searched by, or bring it up to date", "index"),
        _tool("search", "search_videos", "find moments in videos by a sentence, an image or a clip", "search"),
        _tool("serve", "search_videos", "serve a local page to search videos and watch moments in", "serve"),
        _tool("search-videos", "search_videos", "the three above as one: search-videos index, search and serve"),
        _tool("export", "export_model", "write a tower for torch.export or ONNX, to run it without this project"),
        _tool("submission", "make_submission", "make the files that the EPIC-KITCHENS-100 challenge servers take"),
    ),
    "the paper's tables": (
        _tool("reproduce", "reproduce", "show, run or submit the command behind a row of the paper's tables"),
        _tool("tables", "make_tables", "make the paper's tables from runs, measured beside published"),
        _tool("tables-demo", "tables_demo", "run all recipes scaled down on the demo dataset and report on them"),
    ),
    "the demo dataset": (
        _tool("demo-data", "make_demo_data", "make the embedded demo dataset"),
        _tool("demo", "demo", "train and evaluate all tasks on the demo dataset"),
    ),
    "clusters": (
        Program("submit", "avion.commands.submit", "slurm/submit.py", "submit a task to SLURM through submitit"),
        Program("torchrun", "avion.engine.torchrun", "", "torchrun, but with the exit status of the processes"),
        Program("files", "avion.commands.files", "", "say where recipes and batch files are, or copy them out"),
    ),
}


def programs() -> list[Program]:
    """Return all programs, in the order of the table."""
    return [program for group in PROGRAMS.values() for program in group]
