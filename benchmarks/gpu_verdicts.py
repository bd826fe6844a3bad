"""What the sections' numbers say about the goals: a line for each goal."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# The least ratio of mamba-ssm's time to ours, forward + backward of the scan, from that many steps on.
TO_PEER = ((4, 10.0), (16, 5.0), (256, 1.0))
TO_FLOOR = 2.5  # the largest ratio of our time to the floor
TO_ID4 = 1.10  # the largest ratio of an optimizer step of ID6 to one of ID4 at 64 clips
OURS = "triton"


class Verdict(NamedTuple):
    """A goal; `met` is None where nothing was measured."""

    goal: str
    found: str
    met: bool | None

    def __str__(self) -> str:
        return f"{'not measured' if self.met is None else 'met' if self.met else 'MISSED'}: {self.goal}: {self.found}"


def verdicts(sections: list[dict[str, Any]]) -> list[Verdict]:
    data = {section["name"]: section["data"] for section in sections}
    status = {section["name"]: section for section in sections}
    return [
        *_right(status, "kernels", "kernels within their bounds of float64"),
        *_right(status, "pretraining", "the demo's pretraining as on the CPU"),
        *_right(status, "tests", "tests/ops and tests/gpu"),
        *_to_peer(_scans(data)),
        *_to_floor(_scans(data)),
        _to_id4(data),
    ]


def _right(status: dict[str, dict], name: str, goal: str) -> Iterator[Verdict]:
    section = status.get(name)
    if section is None:
        yield Verdict(goal, "not run", None)
    else:
        met = {"ok": True, "wrong": False, "failed": False}.get(section["status"])
        # An error that was found before the time was up counts.
        met = False if section["data"].get("wrong") else met
        yield Verdict(goal, section["line"] or section["status"], met)


def _scans(data: dict[str, dict]) -> dict[tuple[int, int], dict[str, float]]:
    """Return, by rows and steps, the milliseconds of forward + backward with each backend, and the floor.

    Later sections come after earlier ones; one of them is the section that runs once mamba-ssm is built.
    """
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name in ("scan", "long", "peer"):
        for r in data.get(name, {}).get("records", []):
            if r["what"] == "both" and r.get("ms") is not None:
                found.setdefault((r["R"], r["T"]), {})[r["backend"]] = r["ms"]
                found[r["R"], r["T"]]["floor"] = r["floor_ms"]
    return found


def _to_peer(scans: dict[tuple[int, int], dict[str, float]]) -> Iterator[Verdict]:
    for first, goal in TO_PEER:
        of_goal = {size: ms for size, ms in scans.items() if _goal_of(size[1]) == first}
        ratios = {size: ms["mamba_ssm"] / ms[OURS] for size, ms in of_goal.items() if {"mamba_ssm", OURS} <= ms.keys()}
        shown = "; ".join(f"{r:,} x {t:,} {ratio:.1f} x" for (r, t), ratio in ratios.items())
        where = f"T = {first}" if first < 256 else f"T >= {first}"
        yield Verdict(
            f"forward + backward at least {goal:g} x mamba-ssm's speed at {where}",
            shown or "no times of both",
            all(ratio >= goal for ratio in ratios.values()) if ratios else None,
        )


def _goal_of(steps: int) -> int | None:
    """Return the goal for a number of steps; the first two goals are for exactly one number."""
    return steps if steps in (4, 16) else 256 if steps >= 256 else None


def _to_floor(scans: dict[tuple[int, int], dict[str, float]]) -> Iterator[Verdict]:
    ratios = {size: ms[OURS] / ms["floor"] for size, ms in scans.items() if OURS in ms}
    shown = "; ".join(f"{r:,} x {t:,} {ratio:.2f} x" for (r, t), ratio in ratios.items())
    met = all(ratio <= TO_FLOOR for ratio in ratios.values()) if ratios else None
    yield Verdict(f"forward + backward at most {TO_FLOOR:g} x the floor", shown or "no times", met)


def _to_id4(data: dict[str, dict]) -> Verdict:
    goal = f"an optimizer step of ID6 at most {TO_ID4:.2f} x ID4's at 64 clips of 4 frames"
    for name in ("steps", "step"):  # the former section alternates between more models
        for r in data.get(name, {}).get("records", []):
            if r["row"] == "ID6" and r["backend"] == OURS and r.get("to_id4"):
                return Verdict(goal, f"{r['to_id4']:.2f} x ({r['ms']:.1f} ms)", r["to_id4"] <= TO_ID4)
    return Verdict(goal, "no times of both", None)
