"""Small files and odd words that would fill the memory, take hours, wait forever, or forge a line: each is refused in
one line, within a second of computing time and 200 MB.

    python -m tests.endurance.bombs [--short] [--only TEXT]

Every try is made in a forked process of its own, whose computing time and largest memory are measured. The environment
variable BOMBS_SHOW=1 prints the lines.
"""

import io
import json
import os
import pickle
import resource
import select
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from avion.data.captions import read_narrations
from avion.data.egoschema import read_answers, read_questions
from avion.data.ek100 import load_relevancy, read_ek100_retrieval
from avion.data.video_list import read_video_list
from avion.engine.args import parse
from avion.engine.feature_shards import Shards
from avion.engine.options.model_args import parse_model_args
from avion.engine.options.pretrain import PretrainOptions
from avion.engine.yaml_files import read_yaml_mapping
from avion.errors import UserError, printable
from avion.json_lines import read_json_lines
from avion.safe_pickle import load_pickle
from avion.weights.files import read_checkpoint
from tests.endurance import frame
from tests.endurance.hostile_pickles import PRIME, checkpoints, data_pickles, old_checkpoints, weights, written

_SECONDS, _BYTES, _HANGS_S = 1.0, 200_000_000, 30


def refused(call: Callable[[], object]) -> str:
    """The line with which `call` refuses its work. AssertionError where it takes longer, takes more, or does not."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _tell(call, write_end)
    os.close(write_end)
    try:
        ready, _, _ = select.select([read_end], [], [], _HANGS_S)
        assert ready, f"it still ran after {_HANGS_S} s"
        with open(read_end, "rb", closefd=False) as pipe:
            told = json.loads(pipe.read() or b'{"kind": "died"}')
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)
    assert told["kind"] == "UserError", f"{told}"
    assert told["seconds"] < _SECONDS and told["bytes"] < _BYTES, f"{told}"
    assert told["line"] == printable(told["line"]) and len(told["line"]) < 4100, f"{told}"
    return told["line"]


def _tell(call: Callable[[], object], pipe: int) -> None:
    """In the child: do it, and write what came of it."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kind, line = "nothing was refused", ""
    try:
        call()
    except BaseException as e:
        kind, line = type(e).__name__, str(e)[:5000]
    seconds = time.process_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    os.write(pipe, json.dumps({"kind": kind, "seconds": seconds, "bytes": grown, "line": line}).encode())
    os._exit(0)


def each(bombs: Callable[[], Iterator[tuple[str, Callable[[Path], object]]]]) -> tuple[Callable, int, int]:
    """A trial that goes through all bombs of a kind: the try of number n lights bomb n."""
    kind = list(bombs())
    few = max(6, len(kind) // 8)

    def light(trial: frame.Trial) -> None:
        # The short form draws some of the bombs, other ones each time.
        name, call = kind[int(trial.rng.integers(len(kind))) if trial.short else trial.number]
        try:
            line = refused(lambda: call(trial.folder))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
        if os.environ.get("BOMBS_SHOW"):
            print(f"  {name}: {line}")

    return light, len(kind), few


# --- YAML, JSON, arrays, names, pipes ------------------------------------------------------------------------------


def yamls() -> Iterator[tuple[str, Callable[[Path], object]]]:
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts = {
        "aliases of aliases": laughs,
        "an alias of itself": "a: &a [*a]",
        "a merged alias": "a: &a {b: 1}\nc:\n  <<: *a",
        "deep lists": "epochs: " + "[" * 30_000,
        "deep mappings": "{a: " * 20_000,
        "an integer of a million digits": "epochs: " + "9" * 1_000_000,
        "an integer of 90,000 digits": "epochs: " + "9" * 90_000,
        "an integer of base 60": "epochs: " + "1:" * 30_000 + "1",
        "a date that does not exist": "seed: 2001-13-45",
        "a tag that lies": "seed: !!int x",
        "a tag of Python": "seed: !!python/object/apply:os.system [true]",
        "binary that is none": "seed: !!binary \xe4",
        "a key that is a list": "? [a]\n: 1",
        "nan": "lr: .nan",
        "inf": "lr: .inf",
        "minus inf": "lr: -.inf",
        "a float of the wrong type": "epochs: 1.5",
        "a control character": "a: \x1b[2J",
        "colliding keys": "".join(f"{i * PRIME}: 1\n" for i in range(1, 3800)),
        "a text of a megabyte": "model: " + "x" * 2**20,
        "an empty key": "? \n: 1",
        "an escape in a key": '"\\e[2J\\n": 1',
    }

    def configured(folder: Path, content: str) -> object:
        return parse(PretrainOptions, ["--config", str(written(folder, "a.yaml", content))], "main_pretrain.py", "x")

    for what, content in texts.items():
        yield f"--config: {what}", lambda folder, c=content: configured(folder, c)
    yield "a recipe of aliases", lambda folder: read_yaml_mapping(written(folder, "a.yaml", laughs), "recipe")
    for what, words in (
        ("digits", "depth=" + "9" * 100_000),
        ("nan", "drop_path_rate=nan"),
        ("inf", "temperature_init=inf"),
        ("a list", "depth=[[[[]]]]"),
        ("an alias", "dt_rank=*a"),
        ("escapes", "depth=\x1b[2J\n"),
        ("a name", "\x1b[2J=1"),
    ):
        yield f"--model-args: {what}", lambda folder, w=words: parse_model_args([w], "TIMEMAMBA_VITB16")
    for flag, word in (
        ("--epochs", "9" * 100_000),
        ("--lr", "9" * 100_000),
        ("--lr", "nan"),
        ("--wd", "inf"),
        ("--epochs", "1e999"),
        ("--epochs", "\x1b[2J\n"),
        ("--model", "\x1b[2J\n" * 1000),
        ("--\x1b[2J\n", "1"),
        ("--seed", "1_0"),
    ):
        yield (
            f"{flag!r} {word[:10]!r}",
            lambda folder, f=flag, w=word: parse(PretrainOptions, [f"{f}={w}"], "main", "x"),
        )


def jsons() -> Iterator[tuple[str, Callable[[Path], object]]]:
    texts = {
        "deep lists": "[" * 1_000_000,
        "deep lists that end": "[" * 900 + "]" * 900,
        "deep objects": '{"a":' * 500_000,
        "an integer of a million digits": '[{"q_uid": ' + "9" * 1_000_000 + "}]",
        "nan": '[{"q_uid": NaN}]',
        "an infinity": '[{"q_uid": 1e999}]',
        "half": '[{"q_uid"',
        "surrogates": '["\\ud800"]',
    }
    for what, content in texts.items():
        for reader in (read_questions, lambda path: read_narrations([path]), lambda path: read_answers(path, [])):
            yield what, lambda folder, r=reader, c=content: r(written(folder, "a.json", c))
    for what in ("deep lists", "an integer of a million digits"):
        yield f"a line: {what}", lambda folder, c=texts[what]: read_narrations([written(folder, "a.jsonl", c)])
    long = "video,start,end,caption\n" + "a,0,1," + "x" * 2_000_000 + "\n"
    yield "a field of a CSV of 2 MB", lambda folder: read_narrations([written(folder, "a.csv", long)])
    digits = "video,start,end,caption\na," + "9" * 100_000 + ",1,x\n"
    yield "a number of a CSV of 100,000 digits", lambda folder: read_narrations([written(folder, "a.csv", digits)])


def arrays() -> Iterator[tuple[str, Callable[[Path], object]]]:
    from avion.commands.make_submission import read_matrix

    def npy(shape: tuple[int, ...], descr: str = "<f8", raw: bytes = b"") -> bytes:
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + raw

    for what, content in {
        "10^12 numbers": npy((10**12,)),
        "10^6 by 10^6 numbers": npy((10**6, 10**6), raw=bytes(80)),
        "10^12 empty texts": npy((10**12,), "|S0"),
        "objects": npy((2,), "|O", pickle.dumps([1, 2])),
        "fewer than stated": npy((3,), raw=bytes(8)),
        "a negative side": npy((-3, -3), raw=bytes(72)),
        "no header": b"\x93NUMPY",
    }.items():
        yield what, lambda folder, c=content: read_matrix(str(written(folder, "a.npy", c)))

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a.npy", npy((40_000_000,)) + bytes(320_000_000))
    packed = buffer.getvalue()
    yield "a zip that unpacks to 320 MB", lambda folder: read_matrix(str(written(folder, "a.npy", packed)))


# --- names and files -------------------------------------------------------------------------------------------------


def names() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for what in (
        "line\nerror: forged",
        "\x1b[2J\x1b[1;1H",
        "turned \u202e",
        "\u2028",
        "\x07\x9b2J",
        os.fsdecode(b"\xff"),
    ):
        path = f"no such folder/{what}"
        for reader in (
            lambda p: load_pickle(p, "narrations"),
            read_checkpoint,
            read_video_list,
            read_ek100_retrieval,
            read_questions,
            lambda p: read_narrations([p + ".csv"]),
            read_yaml_mapping,
            lambda p: load_relevancy(p, 1, 1),
        ):
            yield f"a file {what!r}", lambda folder, r=reader, p=path: r(p)
        row = [("../" + what, 0.0, 1.0, "caption")]
        yield (
            f"a video {what!r}",
            lambda folder, r=row: read_narrations(
                [written(folder, "a.pkl", pickle.dumps(r) if "\udcff" not in str(r) else b"")]
            ),
        )

        def entry(folder: Path, what: str = what) -> object:
            torch.save({"epoch": 1, what: 2}, folder / "a.pt")
            return weights(folder / "a.pt")

        if "\udcff" not in what:
            yield f"an entry of a checkpoint {what!r}", entry


def pipes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """A named pipe in the place of every file that is read: opening it would wait for a writer."""

    def pipe(folder: Path, file: str) -> str:
        os.mkfifo(folder / file)
        return str(folder / file)

    def shards(folder: Path, file: str) -> object:
        settings = {"shard_size": 2, "format": "npz"}
        if file == "index.jsonl":
            Shards(folder, 2, settings).close()
        os.mkfifo(folder / file)
        return Shards(folder, 2, settings)

    def log(folder: Path, file: str) -> object:
        from avion.engine.console import setup_logging
        from avion.engine.distributed import World

        os.mkfifo(folder / file)
        return setup_logging(World(), str(folder))

    for suffix in ("pkl", "csv", "json", "jsonl"):
        yield f"narrations.{suffix}", lambda folder, s=suffix: read_narrations([pipe(folder, f"a.{s}")])
        yield f"list.{suffix}", lambda folder, s=suffix: read_video_list(pipe(folder, f"a.{s}"))
    yield "relevancy", lambda folder: load_relevancy(pipe(folder, "a.pkl"), 1, 1)
    yield "checkpoint.pt", lambda folder: read_checkpoint(pipe(folder, "a.pt"))
    yield "checkpoint.safetensors", lambda folder: read_checkpoint(pipe(folder, "a.safetensors"))
    yield "questions", lambda folder: read_questions(pipe(folder, "a.json"))
    yield "--config", lambda folder: read_yaml_mapping(pipe(folder, "a.yaml"))
    yield "EK-100", lambda folder: read_ek100_retrieval(pipe(folder, "a.csv"))
    yield "log.txt", lambda folder: read_json_lines(Path(pipe(folder, "log.txt")))
    for file in ("settings.json", "index.jsonl", ".lock"):
        yield f"shards' {file}", lambda folder, f=file: shards(folder, f)
    yield "train.log", lambda folder: log(folder, "train.log")


def torn_shards(trial: frame.Trial) -> None:
    """A shard that was cut short or changed, or whose lines in the index are odd, is made again."""
    form = ("npz", "safetensors")[trial.number % 2]
    settings = {"shard_size": 3, "format": form}
    with Shards(trial.folder, 6, settings) as shards:
        for shard in (0, 1):
            entries = [{"row": row} for row in shards.rows(shard)]
            shards.write(shard, {"clip": torch.rand(3, 1000)}, entries)
    with Shards(trial.folder, 6, settings) as shards:
        assert shards.todo() == []
    path, index = trial.folder / f"00001.{form}", trial.folder / "index.jsonl"
    if trial.number % 4 < 2:
        content = path.read_bytes()
        path.write_bytes(content[: int(trial.rng.integers(len(content)))])
    else:
        odd = [1.5, -1, 10**30, "3", None, [3], True, {"a": 3}][int(trial.rng.integers(8))]
        lines = index.read_text().splitlines()
        lines[3] = json.dumps({**json.loads(lines[3]), "row": odd})
        index.write_text("\n".join(lines) + "\n")
    with Shards(trial.folder, 6, settings) as shards:
        assert shards.todo() == [1], shards.todo()


def forged_lines(trial: frame.Trial) -> None:
    """What a log line is filled with cannot end the line or move the cursor."""
    import logging

    from avion.engine.console import setup_logging
    from avion.engine.distributed import World

    characters = np.array(["\n", "\r", "\x1b", "\x9b", "\u2028", "\u202e", "\udcff", "\x00", "a", "é", "%s", "{}"])
    odd = "".join(trial.rng.choice(characters, 30))
    setup_logging(World(), str(trial.folder))
    logging.getLogger("avion").info("%s: read, %d rows", odd, 3)
    logging.getLogger("avion").info("%s: %s", Path(odd.replace("\0", "")), UserError(odd))
    setup_logging(World())  # closes the file
    lines = (trial.folder / "train.log").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == "" and lines == [printable(line) for line in lines], lines


def names_of_bytes(trial: frame.Trial) -> None:
    """Folders whose names are no UTF-8: a run with all of its files, and one that goes on after it."""
    odd = trial.folder / os.fsdecode(b"run \xff\xfe")
    words = [*frame.tiny_flags(), "--output-dir", str(odd)]
    done = frame.run(frame.command(words))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (odd / "checkpoint.pt").is_file() and "Traceback" not in done.stderr
    done = frame.run(frame.command([*words, "--root", str(odd / "none"), "--resume", str(odd / "none.pt")]))
    assert "\\xff\\xfe" in frame.error_line(done), done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    frame.main(
        __doc__,
        {
            "pickles of data": each(data_pickles),
            "checkpoints": each(checkpoints),
            "old checkpoints": each(old_checkpoints),
            "YAML and words": each(yamls),
            "JSON and CSV": each(jsons),
            "arrays": each(arrays),
            "names": each(names),
            "pipes": each(pipes),
            "torn shards": (torn_shards, 200, 16),
            "forged lines": (forged_lines, 200, 20),
            "folders that are no UTF-8": (names_of_bytes, 2, 1),
        },
    )
