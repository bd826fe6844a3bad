"""`auto` takes what was measured on this kind of GPU, where it can run; a file from elsewhere is no danger."""

import json
import logging

import pytest
import torch

from avion.ops import choices, tuning
from avion.ops.choices import Choice
from avion.ops.selective_scan import dispatch, resolve_backend

GPU = torch.device("cuda")
CHOICE = Choice("mamba_ssm", {"triton": 2.0, "mamba_ssm": 1.5}, "2026-11-26")
LIKE = torch.empty(6, 4, 8)


@pytest.fixture(autouse=True)
def a_gpu(tmp_path, monkeypatch):
    """As on a machine with a GPU on which every backend runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AVION_TUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU / 1")
    monkeypatch.setattr(dispatch, "logged_picks", set())
    for name in ("triton", "mamba_ssm"):
        backend = dispatch.BACKENDS[name]
        anywhere = dispatch.Backend(backend.run, auto_on=backend.auto_on, float64=backend.float64)
        monkeypatch.setitem(dispatch.BACKENDS, name, anywhere)
    choices.forget()
    yield
    choices.forget()


def resolved(steps: int = 4, name: str = "auto", states: int = 16, dtype=torch.float32, **options) -> str:
    like = torch.empty(6, steps, 8, dtype=dtype)
    return resolve_backend(name, GPU, like=like, states=states, **options)


def stored(choice: Choice = CHOICE, steps: int = 4) -> None:
    choices.store("GPU / 1", {choices.shape_class(steps, 8, 16, torch.float32): choice})


def test_what_was_measured_is_taken_and_said_once(caplog):
    assert resolved() == "triton"
    stored()
    with caplog.at_level(logging.INFO):
        assert resolved() == "mamba_ssm" and resolved() == "mamba_ssm"
    (line,) = (r.getMessage() for r in caplog.records if "mamba_ssm" in r.getMessage())
    assert line == (
        "selective scan on cuda, T<8, D=8, N=16, float32: backend mamba_ssm, the fastest when measured on 2026-11-26 "
        "(mamba_ssm 1.500 ms, triton 2.000 ms)"
    )


def test_only_for_the_shapes_and_dtypes_that_were_measured():
    stored()
    assert resolved(steps=7) == "mamba_ssm"  # between the same powers of two
    assert {resolved(steps=3), resolved(steps=8), resolved(states=8), resolved(dtype=torch.bfloat16)} == {"triton"}
    assert resolve_backend("auto", GPU) == "triton"
    assert resolved(float64=True) == "torch"
    assert resolve_backend("auto", "cpu", like=LIKE, states=16) != "mamba_ssm"


def test_a_name_and_avion_tune_0_overrule_it(monkeypatch):
    stored()
    assert resolved(name="torch") == "torch"
    monkeypatch.setenv("AVION_TUNE", "0")
    assert resolved() == "triton"


def test_what_cannot_run_is_not_taken(monkeypatch):
    stored()
    gone = dispatch.Backend(dispatch.BACKENDS["mamba_ssm"].run, lambda device: "not installed")
    monkeypatch.setitem(dispatch.BACKENDS, "mamba_ssm", gone)
    assert resolved() == "triton"
    stored(CHOICE._replace(backend="no such"))
    assert resolved() == "triton"


def test_later_measurements_are_added():
    stored()
    stored(CHOICE._replace(backend="torch"), steps=64)
    assert (resolved(), resolved(steps=64)) == ("mamba_ssm", "torch")
    stored(CHOICE._replace(backend="triton"))
    assert (resolved(), resolved(steps=64)) == ("triton", "torch")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"T<8, D=8, N=16, float32": "mamba_ssm"}',
        '{"T<8, D=8, N=16, float32": {"backend": ["mamba_ssm"], "milliseconds": {}, "date": ""}}',
        '{"T<8, D=8, N=16, float32": {"backend": "mamba_ssm", "milliseconds": {"a": "b"}, "date": ""}}',
        '{"T<8, D=8, N=16, float32": {"backend": "mamba_ssm", "milliseconds": {}}}',
    ],
)
def test_a_file_that_is_not_ours_is_passed_by(content):
    path = tuning.cache_file("backends", "GPU / 1")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert resolved() == "triton"
    stored()
    assert resolved() == "mamba_ssm" and list(json.loads(path.read_text())) == ["T<8, D=8, N=16, float32"]
