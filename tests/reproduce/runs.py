"""Run directories written by hand, with figures that a test knows."""

import json
from pathlib import Path

RETRIEVAL = ("vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg")


def write_run(folder: Path, recipe: str, rows: list[dict], **record) -> Path:
    """recipe.json and eval_log.txt; `record`: other entries of the former than those of a full run of seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"recipe": recipe, "scale": "full", "seed": 0, "evaluated": "trained", "checkpoint": "x.pt", **record}
    (folder / "recipe.json").write_text(json.dumps(content))
    (folder / "eval_log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def retrieval(epoch: int | None, *percent: float, **more) -> dict:
    """A line of eval_log.txt: V2T, T2V and mean mAP, then nDCG, given in percent."""
    row = {name: value / 100 for name, value in zip(RETRIEVAL, percent, strict=True)}
    return row | ({} if epoch is None else {"epoch": epoch}) | {"clips": 9668, "unreadable": 0, **more}


def accuracies(by_frames: dict[int, float], sampling: str = "prefix") -> list[dict]:
    return [
        {"frames": n, "accuracy": value / 100, "unreadable": 0, "sampling": sampling} for n, value in by_frames.items()
    ]
