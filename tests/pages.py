"""What the pages say in blocks of code, and the parsers that the commands there are meant for."""

import argparse
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch.distributed.run import get_args_parser as torchrun_parser

from avion.commands.console import find
from avion.engine.args import parse
from avion.engine.submit import ENTRY_POINTS, SubmitOptions
from tests.layering import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# --- commands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A line of a bash block; `needs`: what its mark says, None for one that anybody can run at once."""

    words: tuple[str, ...]
    needs: str | None

    def __str__(self) -> str:
        return " ".join(self.words)


def commands(page: Path) -> list[Command]:
    """Of a page, in their order. A command is marked by a comment behind it in which a word is *needs*, or by a line
    of comment of this kind above it, which marks the rest of the block."""
    found = []
    for block in code_blocks(page, "bash"):
        all_need = None
        for line in block.replace("\\\n", " ").splitlines():
            command, comment = re.fullmatch(r"(.*?)(?:(?<!\S)# (.*))?", line).groups()
            mark = re.search(r"\bneeds (\S.*)", comment or "")
            if words := tuple(shlex.split(command)):
                found.append(Command(words, mark[1] if mark else all_need))
            elif mark:
                all_need = mark[1]
    return found


# The model of docs/add_a_model.md, and one that is there.
OWN = {"TIMECONV_VITB16": "TIMESFORMER_VITB16"}
# Programs of other packages, whose flags are theirs.
FOREIGN = {"apptainer", "conda", "docker", "jupyter", "pip", "source", "srun", "tensorboard", "wandb"}


def check(words: tuple[str, ...]) -> None:
    """Raises where a command would refuse its flags or does not exist. To be called in the repository's root."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if "--import" in words:  # the module is the reader's: what it registers stands for any model
        at = words.index("--import")
        words = tuple(OWN.get(word, word) for word in (*words[:at], *words[at + 2 :]))
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest and set(rest) <= set(targets), words
    elif program == "sbatch":
        (number,) = [i for i, word in enumerate(rest) if word.endswith(".sbatch")]
        assert all(word.startswith("--") for word in rest[:number]), "options of sbatch stand before the file"
        (script,) = re.findall(
            r"^(?:launch |program=\()([\w./]+)", (ROOT / rest[number]).read_text(encoding="utf-8"), re.MULTILINE
        )
        check_script(script, rest[number + 1 :])
    elif program == "torchrun":
        args = torchrun_parser().parse_args(rest)
        if args.module and args.training_script == "avion":
            check(("avion", *args.training_script_args))
        else:
            check_script(args.training_script, args.training_script_args)
    elif program == "avion":
        if rest != ["--help"]:
            check_script(script_of(rest[0]), find(rest[0]).argv(rest[1:]))
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:]), words
    elif program == "python" and rest[0] == "-m":
        check_script(rest[1], rest[2:])
    elif program == "python":
        check_script(rest[0], rest[1:])
    else:
        assert program in FOREIGN, f"{words}: an unknown program"


def script_of(command: str) -> str:
    """What runs a command of `avion`: a file of the repository, or a module."""
    program = find(command)
    return program.file or program.module.removesuffix(".__main__")


def check_script(script: str, words: list[str]) -> None:
    if script in ENTRY_POINTS:
        if "--help" not in words:
            parse(ENTRY_POINTS[script], words, script, "")
    elif script == "slurm/submit.py":
        end = words.index("--")
        parse(SubmitOptions, words[1:end], script, "")
        check_script(words[0], words[end + 1 :])
    elif script == "tools/reproduce.py":
        check_reproduce(words)
    else:
        stops_after_parsing(load(script), words)


def check_reproduce(words: list[str]) -> None:
    tool = load("tools/reproduce.py")
    end = words.index("--") if "--" in words else len(words)
    args, others = tool.build_parser().parse_known_args(words[:end])
    tool.job_options(args, others)
    if not args.list:
        for recipe in tool.selected(args):
            parse(ENTRY_POINTS[recipe.entry_point], words[end + 1 :], recipe.entry_point, "")


def load(script: str) -> ModuleType:
    """What a file of the repository runs, or the package behind `python -m`."""
    if script.startswith("tools/") and (ROOT / script).is_file():
        return importlib.import_module(f"avion.commands.{Path(script).stem}")
    if not script.endswith(".py"):
        package = importlib.import_module(script)
        return importlib.import_module(f"{script}.__main__") if hasattr(package, "__path__") else package
    spec = importlib.util.spec_from_file_location("page_" + re.sub(r"\W", "_", script), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Parsed(BaseException):
    """The flags are good; nothing of what they ask for has been done."""


def stops_after_parsing(module: ModuleType, words: list[str]) -> None:
    """`main(words)` as far as to the end of its parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        raise _Parsed

    argparse.ArgumentParser.parse_args = parsed
    try:
        module.main(words)
    except _Parsed:
        return
    except SystemExit as e:
        assert e.code == 0 and "--help" in words, (words, e.code)
        return
    finally:
        argparse.ArgumentParser.parse_args = parse_args
    raise AssertionError(f"{words}: was run without its flags having been parsed")


# --- links -----------------------------------------------------------------------------------


def links(page: Path) -> list[tuple[str, str]]:
    """(path, heading) of every link into the repository; without the other, one of them is empty."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[::2] for target in targets if not re.match(r"[a-z]+:", target)]


def headings(page: Path) -> set[str]:
    """As the anchors that a forge makes of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
