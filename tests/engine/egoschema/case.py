"""A tiny EgoSchema: seven videos, their questions, five public answers, and a checkpoint to answer them with."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from avion.constants import NORM_STYLES
from avion.models import create_model
from avion.weights import save_weights
from tests.videos import write_video

UIDS = [f"video-{k}" for k in range(7)]  # seven divide by no number of processes
SOURCES = {uid: {"video_uid": f"ego{i // 2}", "starting_sec": 0, "ending_sec": 180} for i, uid in enumerate(UIDS)}
TINY = {
    "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "text_width": 32, "text_heads": 2, "text_layers": 1,
    "context_length": 24, "project_embed_dim": 16,
}  # fmt: skip


def write_egoschema(root: Path) -> SimpleNamespace:
    """Files and flags; videos of 60 to 78 frames."""
    for i, uid in enumerate(UIDS):
        write_video(root / f"videos/{uid}.mp4", 60 + 3 * i, first=100 * i, width=48, height=40)
    verbs = ("open", "close", "wash", "cut", "stir", "peel", "pour")
    questions = [
        {
            "q_uid": uid,
            "google_drive_id": "x",
            "question": f"What is done in part {i}?",
            **{f"option {k}": f"C {verbs[(i + k) % 7]}s it, then {verbs[(i + k + 2) % 7]}s a Pan" for k in range(5)},
        }
        for i, uid in enumerate(UIDS)
    ]
    answers = {uid: i % 5 for i, uid in enumerate(UIDS) if i not in (2, 5)}
    for name, content in (("questions", questions), ("answers", answers), ("sources", SOURCES)):
        (root / f"{name}.json").write_text(json.dumps(content))
    checkpoint = write_checkpoint(root / "model.pt", "TIMEMAMBA_VITT16")
    flags = [
        "--root",
        root / "videos",
        "--questions",
        root / "questions.json",
        "--answers",
        root / "answers.json",
        "--pretrain-model",
        checkpoint,
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    return SimpleNamespace(
        root=root, questions=questions, answers=answers, checkpoint=checkpoint, flags=[str(f) for f in flags]
    )


def write_checkpoint(path: Path, name: str) -> Path:
    """Random weights, the time gates open."""
    torch.manual_seed(7)
    model = create_model(name, **TINY)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("alpha_timeattn"):
                parameter.fill_(0.7)
            elif key != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    style = NORM_STYLES["openai"]
    save_weights(model, path, {"norm_style": "openai", "mean": list(style.mean), "std": list(style.std)})
    return path


def read_outputs(folder: Path, counts: tuple[int, ...]) -> dict:
    """What a run wrote, without the paths in it."""
    scores = json.loads((folder / "egoschema_scores.json").read_text())
    answers = {n: json.loads((folder / f"egoschema_{n}.json").read_text()) for n in counts}
    tables = {n: (folder / f"egoschema_{n}.csv").read_text() for n in counts}
    return {"scores": scores["scores"], "figures": scores["figures"], "answers": answers, "tables": tables}
