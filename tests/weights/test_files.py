"""Files of weights: what is read, what is refused, and that nothing in them is ever run."""

import argparse
import http.server
import io
import pickle
import threading
import warnings
import zipfile
from typing import ClassVar

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from torch import nn

from avion.errors import UserError
from avion.weights import files as weight_files
from avion.weights.files import (
    checkpoint_state_dict,
    extend_torch_load,
    read_checkpoint,
    resolve_path,
    write_pt,
    write_safetensors,
)


def refusal(path) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_reads_what_upstream_saves(tmp_path, zipped):
    weights = {"module.w": torch.randn(3, 4), "module.half": torch.randn(5).half()}
    saved = {
        "epoch": 5,
        "state_dict": weights,
        "best_acc1": np.float64(28.625),
        "best32": np.float32(0.5),
        "count": np.int64(-7),
        "flag": np.bool_(True),
        "args": argparse.Namespace(model="CLIP_VITB16", betas=[0.9, 0.999], resume=None),
    }
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.pt")
    assert found["args"] == saved["args"] and found["epoch"] == 5
    assert [found[k] for k in ("best_acc1", "best32", "count", "flag")] == [28.625, 0.5, -7, True]
    for name, value in weights.items():
        assert torch.equal(found["state_dict"][name], value)


def test_weights_are_mapped_not_copied(tmp_path):
    torch.save({"state_dict": {"w": torch.full((1000,), 3.0)}}, tmp_path / "a.pt")
    before = read_checkpoint(tmp_path / "a.pt")["state_dict"]["w"]
    start = (tmp_path / "a.pt").read_bytes().find(np.full(1000, 3, np.float32).tobytes())
    with open(tmp_path / "a.pt", "r+b") as file:
        file.seek(start)
        file.write(np.float32(7).tobytes())
    assert before[0] == 7  # seen through the mapping


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).half())
        self.layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 2)])
        self.register_buffer("scale", torch.randn(2, 3).t())
        self.register_buffer("context_length", torch.tensor(77))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.fixture
def scripted(tmp_path):
    model = Scripted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, its files are not gone
        torch.jit.script(model).save(str(tmp_path / "ts.pt"))
    return model, tmp_path / "ts.pt"


def test_reads_torchscript_without_running_it(scripted, monkeypatch):
    model, path = scripted
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_checkpoint(path)["state_dict"]
    wanted = {k: v for k, v in model.state_dict().items() if k != "context_length"}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_safetensors_and_pt_round_trip(tmp_path):
    weights = {"a": torch.randn(2, 3).t(), "b": torch.randn(4).bfloat16(), "c": torch.tensor(1.5)}
    fields = {"model_config": {"name": "x"}, "preprocess": {"norm_style": "openai"}}
    write_safetensors(weights, tmp_path / "a.safetensors", **fields)
    write_pt({"state_dict": weights, **fields}, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        found = read_checkpoint(path)
        assert found["model_config"] == {"name": "x"} and found["preprocess"] == {"norm_style": "openai"}
        assert all(torch.equal(found["state_dict"][k], v) for k, v in weights.items())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_pt({"state_dict": {"w": torch.ones(2)}}, path)
    old = path.read_bytes()

    def breaks_off(contents, target):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", breaks_off)
    with pytest.raises(UserError, match=r"a.pt: cannot be written \(disk full\)"):
        write_pt({"state_dict": {}}, path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_writing_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"no_such.*does not exist"):
        write_pt({}, tmp_path / "no_such" / "a.pt")


# --- what is refused -------------------------------------------------------------------------


class Runs:
    """A pickle that would make a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def hostile_torchscript(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/constants.pkl", b"\x80\x02N.")
        archive.writestr("x/data.pkl", pickle.dumps(payload, protocol=2))


@pytest.mark.parametrize("how", ["zip", "before-1.6", "plain pickle", "torchscript", "beside the weights"])
def test_pickled_code_is_refused_and_not_run(tmp_path, how):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    evil = Runs(marker)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"state_dict": evil}, protocol=2))
    elif how == "torchscript":
        hostile_torchscript(path, evil)
    elif how == "beside the weights":
        torch.save({"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(model=evil)}, path)
    else:
        torch.save({"state_dict": evil}, path, _use_new_zipfile_serialization=how == "zip")
    assert "is code and not weights" in refusal(path) or how == "plain pickle"
    assert not marker.exists()
    buffer = io.BytesIO(pickle.dumps(Runs(marker)))  # the payload is live: an ordinary unpickler runs it
    pickle.load(buffer).close()
    assert marker.exists()


@pytest.mark.parametrize("value", [np.ones(3), nn.Linear(2, 2), np.dtype("O")], ids=["array", "module", "object"])
def test_other_objects_are_refused(tmp_path, value):
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": value}, tmp_path / "a.pt")
    if isinstance(value, np.dtype):
        read_checkpoint(tmp_path / "a.pt")  # a dtype alone is inert: it is only remembered
    else:
        assert "is code and not weights" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["zip", "before-1.6", "torchscript", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, rng, scripted, kind):
    whole = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pt")
    weights = {f"layer{i}.w": torch.randn(40, 8) for i in range(4)}
    if kind == "torchscript":
        whole = scripted[1]
    elif kind == "safetensors":
        write_safetensors(weights, whole, model_config={"name": "x"})
    else:
        torch.save({"state_dict": weights}, whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.read_bytes()
    read_checkpoint(whole)
    cut = tmp_path / f"cut{whole.suffix}"
    lengths = [0, 1, 3, 4, 8, 30, 64, len(data) // 2, len(data) - 1, *rng.integers(1, len(data), 12).tolist()]
    for length in lengths:
        cut.write_bytes(data[:length])
        assert refusal(cut), length


@pytest.mark.parametrize("kind", ["zip", "before-1.6", "torchscript", "safetensors"])
def test_changed_bytes_raise_nothing_but_user_errors(tmp_path, rng, scripted, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    weights = {"w": torch.randn(2, 3), "v": torch.randn(4)}
    if kind == "torchscript":
        path = scripted[1]
    elif kind == "safetensors":
        write_safetensors(weights, path, model_config={"name": "x"})
    else:
        torch.save({"state_dict": weights, "best": np.float64(2)}, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    ends = np.arange(max(0, len(data) - 40), len(data))  # where a zip's table of contents is found
    for at in [*rng.integers(0, len(data), 30), *rng.choice(ends, 10)]:
        changed = bytearray(data)
        changed[at] = (changed[at] + rng.integers(1, 256)) % 256
        path.write_bytes(changed)
        try:
            checkpoint_state_dict(read_checkpoint(path), path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"\n<!doctype html><html>", "web page"),
        (b"just some text that is no checkpoint", "cannot be read"),
    ],
)
def test_lookalikes_are_named(tmp_path, head, says):
    (tmp_path / "a.pt").write_bytes(head)
    assert says in refusal(tmp_path / "a.pt")


def test_contents_that_are_no_weights(tmp_path):
    path = tmp_path / "a.pt"
    torch.save([torch.ones(2)], path)
    assert "holds a list" in refusal(path)
    for contents, says in [
        ({"epoch": 3, "optimizer": {}}, "epoch"),
        ({"state_dict": {}}, "holds no weights"),
        ({"state_dict": [1, 2]}, "holds no weights"),
        ({"state_dict": {"w": "text"}}, "'w'"),
        ({"state_dict": {3: torch.ones(2)}}, "3"),
        ({"state_dict": {"w": torch.ones(2).to_sparse()}}, "no dense tensor"),
        ({"state_dict": {"w": torch.ones(1).expand(10**9)}}, "not the data"),
        ({"state_dict": {"w": torch.empty(2, device="meta")}}, "no dense tensor"),
    ]:
        with pytest.raises(UserError) as caught:
            checkpoint_state_dict(contents, path)
        assert str(path) in str(caught.value) and says in str(caught.value)


def test_a_bare_state_dict_is_one():
    weights = {"w": torch.ones(2)}
    assert checkpoint_state_dict(weights) == weights


def test_a_tensor_longer_than_its_data_in_torchscript(tmp_path, scripted):
    short = tmp_path / "short.pt"
    with zipfile.ZipFile(scripted[1]) as old, zipfile.ZipFile(short, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:-2] if entry.filename.endswith("/data/0") else data)
    assert "shorter" in refusal(short)


def test_a_memo_of_the_largest_index_in_torchscript(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"\x80\x02N.")
        archive.writestr("x/data.pkl", b"\x80\x02c__torch__\nM\n)\x81r\xff\xff\xff\xff}X\x01\x00\x00\x00aNsb.")
    assert read_checkpoint(tmp_path / "x.pt") == {"state_dict": {}}  # 64 GB for the reader in C


def test_missing_paths(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "is a folder" in refusal(tmp_path)


# --- the hub ---------------------------------------------------------------------------------


def fake_cache(tmp_path, monkeypatch, repo, files):
    """A hub cache as the hub's client leaves it behind."""
    commit = "0" * 40
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, source in files.items():
        target = folder / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_hub_address_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, tmp_path / "a.pt")
    fake_cache(tmp_path, monkeypatch, "own-er/re.po", {"sub/a.pt": tmp_path / "a.pt"})
    assert resolve_path("hf:own-er/re.po/sub/a.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    assert read_checkpoint("hf:own-er/re.po/sub/a.pt")["state_dict"]["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "unreachable"])
def test_a_hub_address_without_network_is_one_line_without_retries(tmp_path, monkeypatch, offline):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    download = huggingface_hub.hf_hub_download

    def local_only(*args, local_files_only=False, **kwargs):
        assert local_files_only  # the hub's own client retries for half a minute
        return download(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local_only)
    with pytest.raises(UserError) as caught:
        read_checkpoint("hf:owner/repo/model.pt")
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("owner/repo", "model.pt", str(tmp_path / "hub"), "give its path"))
    assert ("HF_HUB_OFFLINE" in text) == offline


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs, on this machine."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self):
        name = self.path.removeprefix("/owner/repo/resolve/main/")
        data = self.files.get(name)
        self.send_response(200 if data is not None or self.path == "/" else 404)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        return data

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b"")

    def log_message(self, *args):
        pass


def test_a_download_from_a_hub(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.arange(4.0)}}, buffer)
    monkeypatch.setattr(Hub, "files", {"sub/a.pt": buffer.getvalue()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        assert read_checkpoint("hf:owner/repo/sub/a.pt")["state_dict"]["w"].tolist() == [0, 1, 2, 3]
        assert weight_files.hub_file("owner/repo", ["none.pt", "sub/a.pt"]).name == "a.pt"
        with pytest.raises(UserError, match="has no file other.pt"):
            read_checkpoint("hf:owner/repo/other.pt")
    finally:
        server.shutdown()
        server.server_close()
    read_checkpoint("hf:owner/repo/sub/a.pt")  # from the cache by now


@pytest.mark.parametrize("address", ["hf:", "hf:owner/file.pt", "hf:a//b/c", "hf:a/b/../c", "hf:a b/c/d.pt"])
def test_malformed_hub_addresses(address):
    with pytest.raises(UserError, match="hf:"):
        resolve_path(address)


def test_flag_of_the_caller_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="a.bin or b.bin .*--some-flag"):
        weight_files.hub_file("owner/repo", ["a.bin", "b.bin"], "--some-flag")


def test_what_a_script_lets_torch_load_read_stays_so(tmp_path):
    """And does not change what is read here: numpy's own types would be taken for the stand-ins."""
    path = tmp_path / "checkpoint.pt"
    content = {"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=0.1), "best_acc1": np.float64(0.5)}
    torch.save(content, path)
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path)
        assert read_checkpoint(path)["best_acc1"] == 0.5
        assert torch.serialization.get_safe_globals() == []
        extend_torch_load()
        allowed = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(path)["best_acc1"] == 0.5
        assert set(torch.serialization.get_safe_globals()) == allowed
        found = torch.load(path)
        assert found["args"].lr == 0.1 and found["best_acc1"] == 0.5
        torch.save({"args": OneOfTheirs()}, path)
        with pytest.raises(pickle.UnpicklingError, match="OneOfTheirs"):
            torch.load(path)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class OneOfTheirs:
    """A class that nobody has allowed."""
