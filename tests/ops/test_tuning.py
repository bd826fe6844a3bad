"""The choice of a kernel's plan: measured once, kept in a file, never guessed again."""

import json
from typing import NamedTuple

import pytest
import torch

from avion.ops import tuning


class Plan(NamedTuple):
    block: int
    warps: int


PLANS = [Plan(32, 1), Plan(64, 2), Plan(128, 4)]
LIKE = torch.empty(6, 4, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AVION_TUNE", raising=False)
    tuning.forget_choices()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU / 1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def measured(monkeypatch):
    """Plans in the order in which they were measured; the second one is the fastest."""
    seen: list[Plan] = []

    def milliseconds(run) -> float:
        seen.append(run())
        return {Plan(32, 1): 3.0, Plan(64, 2): 1.0, Plan(128, 4): 2.0}[seen[-1]]

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return seen


def choose(like: torch.Tensor = LIKE, plans=PLANS, op: str = "scan") -> Plan:
    return tuning.tuned(op, like, 16, plans, lambda plan: plan)


def test_the_fastest_plan_is_taken_and_measured_once(measured):
    assert choose() == Plan(64, 2) and measured == PLANS
    assert choose() == Plan(64, 2) and measured == PLANS


def test_a_later_process_takes_the_same_one_without_measuring(measured, monkeypatch, tmp_path):
    choose()
    tuning.forget_choices()  # as in a new process
    assert choose() == Plan(64, 2) and len(measured) == 3
    (file,) = (tmp_path / "avion").iterdir()
    assert "/" not in file.name and list(json.loads(file.read_text()).values()) == [[64, 2]]


def test_shapes_of_another_class_ops_types_and_offers_are_measured_for_themselves(measured):
    choose()
    for number, change in enumerate(
        (
            {"like": torch.empty(9, 4, 8)},
            {"like": torch.empty(6, 8, 8)},
            {"like": torch.empty(6, 4, 9)},
            {"like": LIKE.bfloat16()},
            {"op": "scan backward"},
            {"plans": PLANS[:2]},
        ),
        1,
    ):
        before = len(measured)
        choose(**change)
        assert len(measured) > before, f"change {number}"
    before = len(measured)
    choose(like=torch.empty(7, 5, 8))  # between the same powers of two
    assert len(measured) == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"k": [1, 2]}'])
def test_a_file_that_is_not_ours_is_measured_over(content, measured, tmp_path):
    path = tuning.cache_file("plans", "GPU / 1")
    path.parent.mkdir()
    path.write_text(content)
    assert choose() == Plan(64, 2) and len(measured) == 3
    assert [64, 2] in json.loads(path.read_text()).values()


def test_a_stored_plan_that_is_not_on_offer_is_not_taken(measured):
    choose()
    path = tuning.cache_file("plans", "GPU / 1")
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: [4096, 64]}))
    tuning.forget_choices()
    assert choose() == Plan(64, 2) and len(measured) == 6


def test_plans_that_do_not_fit_are_passed_by(monkeypatch):
    triton = pytest.importorskip("triton")

    def milliseconds(run) -> float:
        if run() != Plan(128, 4):
            raise triton.OutOfResources(300_000, 200_000, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    assert choose() == Plan(128, 4)
    with pytest.raises(RuntimeError, match="none of 2 ways to cut the work fits GPU / 1"):
        choose(plans=PLANS[:2])


def test_the_guess_is_taken_while_a_graph_is_captured_and_where_tuning_is_off(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == PLANS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("AVION_TUNE", "0")
    assert choose() == PLANS[0] and measured == []
    monkeypatch.delenv("AVION_TUNE")
    assert choose() == Plan(64, 2)  # the guess was not kept


def test_a_folder_that_cannot_be_written_is_a_warning(measured, monkeypatch, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert choose() == Plan(64, 2)
    assert "cannot be written" in caplog.text
