"""Every benchmark on small videos: the metrics and predictions follow from features that are computed here."""

import json

import numpy as np
import pytest
import torch

from avion.data.ek100 import read_ek100_retrieval
from avion.data.tokenizer import tokenize
from avion.data.transforms import CropsTransform, normalize_clip
from avion.data.video import VideoStore, open_video
from avion.evaluation.ek100_mir import retrieval_metrics
from avion.json_lines import read_json_lines
from avion.models import model_from_checkpoint
from tests.engine.zeroshot.case import ALL, CHARADES, CHUNK_S, EGTEA, NAMES


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def model(data):
    return model_from_checkpoint(data.checkpoint)


@torch.no_grad()
def texts_of(model, texts):
    return model.encode_text(tokenize(list(texts), context_length=24)).double().numpy()


@torch.no_grad()
def clip_of(model, store, video, start, end, frames):
    """The feature of one clip, (E,)."""
    crop = CropsTransform(32, 1, fused=True)
    scaled = store.read_clip(video, start, end, frames, scaling=lambda h, w: crop.scaling(h, w, None)).frames
    return model.encode_image(normalize_clip(crop.from_scaled(scaled), "openai"))[0].double().numpy()


def classes_of(model, names, templates=("{}",)):
    rows = []
    for own in names:
        texts = [t.replace("{}", name) for t in templates for name in ([own] if isinstance(own, str) else own)]
        rows.append(unit(unit(texts_of(model, texts)).mean(axis=0)))
    return np.stack(rows)


def log_of(folder):
    return {row["dataset"]: row for row in read_json_lines(folder / "eval_log.txt").objects}


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory):
    """One run of all benchmarks by LaViLa's protocols."""
    import main_zeroshot

    folder = tmp_path_factory.mktemp("all")
    assert main_zeroshot.main([*data.flags, "--dataset", *ALL, "--output-dir", str(folder), "--batch-size", "3"]) == 0
    return folder


def test_all_benchmarks_in_one_run(everything):
    found = log_of(everything)
    assert tuple(found) == ALL
    assert [found[name]["clips"] for name in ALL] == [7, 7, 5, 4, 20, 6] and not any(
        r["unreadable"] for r in found.values()
    )
    files = {p.name for p in everything.iterdir() if p.is_file()}
    assert files - {"run.lock"} == {
        "eval_log.txt",
        "train.log",
        "ek100_mir.npy",
        "ek100_cls.npz",
        "egtea.npz",
        "charades_ego.npz",
        "egomcq.json",
        "retrieval.npy",
    }


def test_egtea(data, model, everything):
    """16 frames, 2 apart, 10 windows, 3 crops; the best view of each clip."""
    classes = classes_of(model, [name.replace("_", " ").lower() for name in EGTEA])
    crop, wanted = CropsTransform(32, 3, fused=True), []
    for line in (data.root / "split.txt").read_text().splitlines():
        name = line.split()[0]
        with open_video(data.root / "egtea" / "-".join(name.split("-")[:3]) / f"{name}.mp4") as reader:
            count = reader.num_frames
            scaled = reader.get_scaled(range(count), lambda h, w: crop.scaling(h, w, None))
        frames = crop.from_scaled(scaled)  # (3 crops, 3, F, 32, 32)
        if count < 32:
            frames = torch.cat([frames, torch.zeros(3, 3, 32 - count, 32, 32, dtype=torch.uint8)], dim=2)
        starts = np.linspace(0, max(count - 32, 0), 10).astype(int)
        views = torch.cat([frames[:, :, start : start + 32 : 2] for start in starts])
        with torch.no_grad():
            wanted.append((unit(model.encode_image(normalize_clip(views, "openai"))) @ classes.T).max(axis=0))
    found = np.load(everything / "egtea.npz")
    np.testing.assert_allclose(found["scores"], wanted, atol=1e-5)
    assert found["label"].tolist() == [0, 1, 2, 0, 1] and found["class_key"].tolist()[0] == "take plate"
    right = np.argmax(wanted, axis=1) == [0, 1, 2, 0, 1]
    row = log_of(everything)["egtea"]
    assert row["top1"] == pytest.approx(right.mean())
    assert row["mean_class"] == pytest.approx((right[[0, 3]].mean() + right[[1, 4]].mean() + right[2]) / 3)


def test_charades_ego(data, model, everything):
    store = VideoStore(data.root / "charades", layout="whole")
    clips = [clip_of(model, store, f"VID{i}EGO", 0, np.inf, 16) for i in range(4)]
    wanted = unit(clips) @ classes_of(model, CHARADES).T
    found = np.load(everything / "charades_ego.npz")
    np.testing.assert_allclose(found["scores"], wanted, atol=1e-5)
    labels = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(found["label"], labels)
    averages = []
    for c in range(4):  # videos 0, 2, 3 in their order; video 1 shows nothing and comes last
        order = sorted((0, 2, 3), key=lambda i: -wanted[i, c])
        ranks = [r for r, i in enumerate(order, 1) if labels[i, c]]
        averages.append(np.mean([k / r for k, r in enumerate(ranks, 1)]))
    assert log_of(everything)["charades_ego"]["map"] == pytest.approx(np.mean(averages))


def ek100(data):
    table = read_ek100_retrieval(data.root / "annotations/EPIC_100_validation.csv")
    return table, VideoStore(data.root / "ek100", chunk_length=CHUNK_S)


def test_ek100_actions_have_all_their_narrations_as_names(data, model, everything):
    table, store = ek100(data)
    clips = [clip_of(model, store, row.video, row.start, row.end, 16) for row in table]
    found = np.load(everything / "ek100_cls.npz")
    assert found["class_key"].tolist() == ["0:2", "1:2", "2:5", "3:10"]
    names = [NAMES["0:2"], NAMES["1:2"], ["wash pan"], NAMES["3:10"]]
    wanted = unit(clips) @ classes_of(model, names).T
    np.testing.assert_allclose(found["scores"], wanted, atol=1e-5)
    labels = [
        found["class_key"].tolist().index(f"{v}:{n}") for v, n in zip(table.verb_class, table.noun_class, strict=True)
    ]
    assert found["label"].tolist() == labels
    assert log_of(everything)["ek100_cls"]["top1"] == pytest.approx((wanted.argmax(axis=1) == labels).mean())


def test_ek100_retrieval(data, model, everything):
    table, store = ek100(data)
    clips = [clip_of(model, store, row.video, row.start, row.end, 4) for row in table]
    split = data.root / "annotations/retrieval_annotations"
    texts = [
        line.split(",")[1] for line in (split / "EPIC_100_retrieval_test_sentence.csv").read_text().splitlines()[1:]
    ]
    wanted = (unit(clips) @ unit(texts_of(model, texts)).T + 1) / 2
    np.testing.assert_allclose(np.load(everything / "ek100_mir.npy"), wanted, atol=1e-5)
    relevancy = np.load(split / "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl", allow_pickle=True)
    metrics = retrieval_metrics(wanted.astype(np.float32), relevancy.astype(np.float32))
    row = log_of(everything)["ek100_mir"]
    assert row["avg_map"] == pytest.approx(metrics["avg_map"]) and row["avg_ndcg"] == pytest.approx(metrics["avg_ndcg"])


@pytest.mark.parametrize("cosine", [False, True])
def test_egomcq_compares_features_as_they_are(data, model, everything, runs, tmp_path, cosine):
    folder = everything
    if cosine:
        folder = tmp_path / "out"
        assert runs("--egomcq-cosine", datasets=["egomcq"])[0] == 0
    store = VideoStore(data.root / "ego4d", chunk_length=CHUNK_S)
    content, found = (
        json.loads((data.root / "egomcq.json").read_text()),
        json.loads((folder / "egomcq.json").read_text()),
    )
    right = {1: [], 2: []}
    for key, row in content.items():
        clips = [
            clip_of(model, store, c["video_uid"], c["clip_start"], c["clip_end"], 4) for c in row["choices"].values()
        ]
        query = texts_of(model, [row["query"]["clip_text"]])[0]
        scores = unit(clips) @ unit(query) if cosine else np.stack(clips) @ query
        np.testing.assert_allclose(found[key]["scores"], scores, rtol=1e-4, atol=1e-4)
        assert found[key]["choice"] == scores.argmax() and found[key]["answer"] == row["answer"]
        right[row["types"]].append(scores.argmax() == row["answer"])
    metrics = log_of(folder)["egomcq"]
    assert (metrics["intra"], metrics["inter"]) == (np.mean(right[1]), np.mean(right[2]))


def test_retrieval_of_captions(data, model, everything):
    store = VideoStore(data.root / "ego4d", chunk_length=CHUNK_S)
    clips = [clip_of(model, store, f"uid{i % 3}", 0.5 * i, 0.5 * i + 1.5, model.config.num_frames) for i in range(6)]
    texts = ["clip number 0", "a second sentence", *(f"clip number {i}" for i in range(1, 6))]
    wanted = (unit(clips) @ unit(texts_of(model, texts)).T + 1) / 2
    np.testing.assert_allclose(np.load(everything / "retrieval.npy"), wanted, atol=1e-5)
    own = [0, 0, 1, 2, 3, 4, 5]
    ranks = [(wanted[:, t] >= wanted[v, t]).sum() for t, v in enumerate(own)]
    assert log_of(everything)["retrieval"]["txt_r1"] == pytest.approx(np.mean(np.array(ranks) == 1))


def test_flags_change_the_protocol(data, model, runs, tmp_path):
    """Other frames, windows and templates, on classes; the features of several windows are averaged in retrieval. The
    clips come from a process of their own.
    """
    datasets = ["charades_ego", "retrieval"]
    words = ["--clip-length", 3, "--num-clips", 2, "--templates", "#C C {}", "#C {}", "--workers", 1]
    assert runs(*words, datasets=datasets)[0] == 0
    store = VideoStore(data.root / "charades", layout="whole")
    crop = CropsTransform(32, 1, fused=True)
    best = []
    for i in range(4):
        frames = store.read_clip(
            f"VID{i}EGO", 0, np.inf, 3, views=2, scaling=lambda h, w: crop.scaling(h, w, None)
        ).frames
        views = crop.from_scaled(frames)[0].unflatten(1, (2, 3)).transpose(0, 1)
        with torch.no_grad():
            features = unit(model.encode_image(normalize_clip(views, "openai")))
        best.append((features @ classes_of(model, CHARADES, ("#C C {}", "#C {}")).T).max(axis=0))
    np.testing.assert_allclose(np.load(tmp_path / "out/charades_ego.npz")["scores"], best, atol=1e-5)
