"""README.md and docs/getting_started.md do what they say; links, flags and packages in all pages are there.

A command in a bash block that is not marked with *needs* (see `tests.pages.commands`) is run here, in the page's order,
in a folder of its own on a small demo dataset; those of make are .ci/run's. The flags of all others are parsed.
"""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

import avion.models
from avion.commands.console import find
from avion.data.demo import ensure_demo_dataset
from avion.engine import demo_data
from avion.weights import save_weights
from tests import pages
from tests.data.demo_case import SMALL
from tests.models.registered import registered_for_a_while
from tests.models.tiny import TINY, tiny_model
from tests.pages import PAGES, README, ROOT, Command, code_blocks, commands
from tests.test_packaging import PROJECT, Requirement, canonicalize_name
from tests.videos import write_video

matplotlib.use("Agg")

STARTED = ROOT / "docs/getting_started.md"
RUN = [README, STARTED]
EVERY = [pytest.param(page, command, id=f"{page.stem}: {command}") for page in PAGES for command in commands(page)]
# In the place of what the page says: less of it.
QUICKLY = {"main_pretrain.py": "--epochs 2 --eval-freq 1 --batch-size 4 --warmup-epochs 0 --workers 0".split()}
NORM = {"norm_style": "openai", "mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The repository as a newcomer has it, but for its weight; the current folder."""
    for name in ("recipes", "docs", "tools", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # doctor would try the kernels in it, slowly
    small = lambda root: ensure_demo_dataset(root, size=SMALL, workers=1)  # noqa: E731
    monkeypatch.setattr(demo_data, "ensure_demo_dataset", small)
    return tmp_path


def run(command: Command) -> None:
    """A command that is not marked; fails where it fails, and where nothing here knows how to run it."""
    program, *words = command.words
    if program == "make":
        calls = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
        assert words and set(words) <= set(calls), f"{command}: .ci/run does not call it; mark it with what it needs"
        return
    if program == "avion":
        program, words = "python", [pages.script_of(words[0]), *find(words[0]).argv(words[1:])]
    assert program == "python", f"{command}: cannot be run here; mark it with what it needs"
    words = words[1:] if words[0] == "-m" else words
    more = [] if "--evaluate" in words or "--help" in words else QUICKLY.get(words[0], [])
    try:
        status = pages.load(words[0]).main([*words[1:], *more])
    except SystemExit as e:
        status = e.code
    assert not status, f"{command}: exit status {status}"


def test_the_readmes_commands(folder, capsys):
    for command in commands(README):
        if command.needs is None:
            run(command)
    said = capsys.readouterr().out
    assert "CLIP_TimeMamba_like_frozen_joint" in said and "--nproc_per_node=8" in said and "table8_row7" in said


def test_the_readmes_lines_of_python(folder, monkeypatch, capsys):
    create = avion.models.create_model
    small = {key: value for key, value in TINY.items() if key not in ("project_embed_dim", "num_frames")}
    monkeypatch.setattr(avion.models, "create_model", lambda name, **fields: create(name, **small, **fields))
    save_weights(tiny_model("TIMEMAMBA_VITB16"), folder / "checkpoint.pt", NORM)
    write_video(folder / "video.mp4", 20)
    blocks = code_blocks(README, "python")
    assert len(blocks) == 3
    for block in blocks:
        names: dict = {}
        exec(block, names)
        if "create_model" in names:
            assert names["features"].shape == (2, 256) and names["model"].config.num_frames == 8
        if "scores" in names:
            assert len(block.strip().splitlines()) == 5 and not names["model"].training
            torch.testing.assert_close(names["classes"].norm(dim=1), torch.ones(2))
            assert names["scores"].shape == (2,) and names["scores"].abs().max() <= 1


def test_the_ten_minutes(folder, capsys):
    """All of the page's commands, and then its Python, on what they have left."""
    for command in commands(STARTED):
        if command.needs is None:
            run(command)
    assert len(list((folder / "runs").rglob("*.png"))) == 1
    (block,) = code_blocks(STARTED, "python")
    capsys.readouterr()
    exec(block, {})
    said = capsys.readouterr().out.splitlines()
    promised = re.search(r"```python\n.*?```.*?```\n(.*?)```", STARTED.read_text(encoding="utf-8"), re.DOTALL)[1]
    texts = [[line.split()[1:] for line in lines] for lines in (said, promised.splitlines())]
    assert texts[0] == texts[1] and all(-1 <= float(line.split()[0]) <= 1 for line in said)


@pytest.mark.parametrize("page, command", EVERY)
def test_the_flags_of_every_command_exist(page, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    own = {"my_pretrain.py": "main_pretrain.py"}  # the reader's, on the page about adding a model
    with registered_for_a_while():
        if page.stem == "add_a_model":  # its commands name the model that it registers
            exec(code_blocks(page, "python")[0], {})
        pages.check(tuple(own.get(word, word) for word in command.words))


@pytest.mark.parametrize(
    "line, what",
    [
        ("python main_pretrain.py --batchsize 4", "did you mean --batch-size"),
        ("python main_pretrain.py --config recipes/table9_row6_actions.yaml", "not of main_pretrain.py"),
        ("torchrun --nproc_per_node=8 main_egoschema.py --frame 4", "did you mean --frames"),
        ("sbatch slurm/pretrain.sbatch --modell X", "did you mean --model"),
        ("python slurm/submit.py main_pretrain.py --node 2 -- --model X", "did you mean --nodes"),
        ("python tools/reproduce.py --table 11", "no recipes for it"),
        ("python tools/reproduce.py --table 8 --runs x --go", "unknown flag --go"),
        ("python tools/plot_run.py runs/a --outputs b.png", "--outputs"),
        ("python tools/no_such_tool.py", "No such file"),
        ("make coffee", "coffee"),
        ("curl something", "unknown program"),
    ],
)
def test_a_wrong_command_is_seen(line, what, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit), match=what):
        pages.check(tuple(line.split()))


def test_marks_by_hand(tmp_path):
    text = "```bash\na  # says needs x\nb \\\n    -c  # plain\n# needs y and z\nd '# needs'  # more\n```\n"
    (tmp_path / "page.md").write_text(text)
    assert commands(tmp_path / "page.md") == [
        Command(("a",), "x"),
        Command(("b", "-c"), None),
        Command(("d", "# needs"), "y and z"),
    ]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for path, heading in pages.links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not heading or heading in pages.headings(target), f"{page.name}: {path}#{heading}"


def test_the_readme_lists_every_page_of_the_docs_once():
    (section,) = re.findall(r"^## Docs\n(.*?)^## ", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    listed = re.findall(r"\]\(((?:docs/)?\w+\.(?:md|cff))\)", section)
    pages_of_the_root = ["CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"]
    assert sorted(listed) == sorted([*pages_of_the_root, *(str(page.relative_to(ROOT)) for page in pages.DOCS)])


def test_the_readme_names_every_package():
    (section,) = re.findall(r"^## Packages\n(.*?)^## ", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    named = [canonicalize_name(n) for cell in cells for n in re.sub(r"\(.*?\)", "", cell).replace(",", " ").split()]
    extras = PROJECT["optional-dependencies"]
    ranges = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    assert sorted(named) == sorted({canonicalize_name(Requirement(line).name) for line in ranges})
    for cell in cells:
        if extra := re.search(r"\(extra `(\w+)`\)", cell):
            mine = {canonicalize_name(Requirement(line).name) for line in extras[extra[1]]}
            assert {canonicalize_name(n) for n in cell[: extra.start()].replace(",", " ").split()} <= mine
