"""EgoSchema from a checkpoint to answers: scores, files, overlap, submission, mistakes."""

import csv
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import main_egoschema
from avion.data.tokenizer import tokenize
from avion.data.transforms import EvalTransform, normalize_clip
from avion.data.video import open_video
from avion.engine.egoschema import texts
from avion.evaluation.egoschema import wilson_interval
from avion.models import model_from_checkpoint
from tests.engine.egoschema.case import UIDS, read_outputs, write_checkpoint
from tests.processes import run_processes
from tests.videos import MAX_INDEX, read_barcode, write_video

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT / "tests/fixtures"


# ---- answers -----------------------------------------------------------------------------------


def by_hand(data, uid, count, sampling, prompts):
    """Five cosines, from whole clips and one text at a time, in float64."""
    model = model_from_checkpoint(data.checkpoint).eval()
    with open_video(data.root / f"videos/{uid}.mp4") as reader:
        last = reader.num_frames - 1
        if sampling == "prefix-hold" or (sampling == "prefix" and count <= reader.num_frames):
            ids = [min(i, last) for i in range(count)]
        else:
            ids = [int((i + 0.5) * reader.num_frames / count) for i in range(count)]
        frames = reader.get_frames(ids)
    video = EvalTransform(32, norm_style="openai", fused=True)(frames, None).double()
    mean = torch.tensor([122.7709383, 116.7460125, 104.0937362]).double()
    std = torch.tensor([68.5005327, 66.6321579, 70.3231631]).double()
    video = (video - mean[:, None, None, None]) / std[:, None, None, None]
    model = model.double()
    (question,) = [q for q in data.questions if q["q_uid"] == uid]
    cosines = []
    with torch.no_grad():
        clip = torch.nn.functional.normalize(model.encode_image(video[None]), dim=-1)[0]
        for k in range(5):
            option = question[f"option {k}"].lower()
            sentences = [p.replace("{option}", option).replace("{question}", question["question"]) for p in prompts]
            features = [model.encode_text(tokenize(s, 24))[0] for s in sentences]
            mean_feature = sum(f / f.norm() for f in features)
            cosines.append(float(clip @ mean_feature / mean_feature.norm()))
    return cosines


@pytest.mark.parametrize(
    "sampling, prompts",
    [
        ("uniform", ["Is it '{option}'"]), ("prefix", ["{option}", "{question} It is {option}."]),
        ("prefix-hold", ["Is it '{option}'"]),
    ],
)  # fmt: skip
def test_scores_are_the_cosines_of_clip_and_texts(data, runs, tmp_path, sampling, prompts):
    """Two counts at once, one of them longer than the videos; a few tokens in work at a time."""
    more = [] if len(prompts) == 1 else ["--prompt", *prompts]
    status, out, _, _ = runs("--frames", 5, 90, "--sampling", sampling, "--max-tokens", 50, *more)
    assert status == 0
    found = read_outputs(tmp_path / "out", (5, 90))
    for uid in (UIDS[0], UIDS[6]):
        for count in (5, 90):
            wanted = by_hand(data, uid, count, sampling, prompts)
            np.testing.assert_allclose(found["scores"][uid][str(count)], wanted, atol=2e-5)
    assert len({tuple(np.round(row["5"], 3)) for row in found["scores"].values()}) > 1  # they do depend on the video


@pytest.mark.parametrize("sampling", ["prefix", "prefix-hold"])
def test_8192_frames_of_a_real_video_of_5400(data, runs, tmp_path, sampling):
    """A whole EgoSchema video, of three minutes at 30 frames per second, against the frames by hand and one forward."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/v.mp4", 5400, width=32, height=32, numbers=MAX_INDEX + 1)
    question = {**data.questions[0], "q_uid": "v"}
    (tmp_path / "q.json").write_text(json.dumps([question]))
    status, _, _, log = runs(
        "--root",
        tmp_path / "videos",
        "--questions",
        tmp_path / "q.json",
        "--frames",
        8192,
        "--sampling",
        sampling,
        "--max-tokens",
        2000,
        without=("--answers", "--root", "--questions"),
    )
    assert status == 0, log
    scores = json.loads((tmp_path / "out/egoschema_scores.json").read_text())["scores"]["v"]["8192"]

    spread = [(2 * i + 1) * 5400 // 16384 for i in range(8192)]
    ids = spread if sampling == "prefix" else [min(i, 5399) for i in range(8192)]
    with open_video(tmp_path / "videos/v.mp4") as reader:
        assert reader.num_frames == 5400
        frames = reader.get_frames(range(5400))
    assert [read_barcode(frames[i]) for i in ids[::511]] == [i % 4096 for i in ids[::511]]
    model = model_from_checkpoint(data.checkpoint).eval()
    video = normalize_clip(EvalTransform(32, fused=True)(frames, None)[:, ids], "openai")
    texts = tokenize([f"Is it '{question[f'option {k}'].lower()}'" for k in range(5)], 24)
    with torch.no_grad():
        clip = torch.nn.functional.normalize(model.encode_image(video[None]), dim=-1)[0]
        wanted = torch.nn.functional.normalize(model.encode_text(texts), dim=-1) @ clip
    np.testing.assert_allclose(scores, wanted, atol=2e-5)


def test_the_files_hold_what_the_scores_say(data, runs, tmp_path):
    assert runs("--frames", 16, 4)[0] == 0
    found = read_outputs(tmp_path / "out", (4, 16))
    for count in (4, 16):
        wanted = {uid: int(np.argmax(found["scores"][uid][str(count)])) for uid in UIDS}
        assert found["answers"][count] == wanted
        rows = list(csv.reader(found["tables"][count].splitlines()))
        assert rows == [["q_uid", "answer"], *([uid, str(wanted[uid])] for uid in UIDS)]
        right = sum(wanted[uid] == answer for uid, answer in data.answers.items())
        figures = found["figures"][str(count)]
        assert (figures["correct"], figures["total"], figures["unreadable"]) == (right, 5, 0)
        assert figures["accuracy"] == right / 5
        assert (figures["low"], figures["high"]) == wilson_interval(right, 5)


def test_the_table(data, runs, tmp_path):
    status, out, _, _ = runs("--frames", 4, 16)
    figures = read_outputs(tmp_path / "out", (4, 16))["figures"]
    lines = out.splitlines()
    assert lines[0].split() == ["frames", "accuracy", "95", "%", "interval", "right", "answered"]
    for line, count in zip(lines[2:], (4, 16), strict=True):
        f = figures[str(count)]
        wanted = [
            str(count),
            f"{100 * f['accuracy']:.2f}",
            f"{100 * f['low']:.2f}",
            "-",
            f"{100 * f['high']:.2f}",
            f"{f['correct']}/5",
            "7/7",
        ]
        assert line.split() == wanted
    logged = [json.loads(line) for line in (tmp_path / "out/eval_log.txt").read_text().splitlines()]
    assert [(row["frames"], row["sampling"]) for row in logged] == [(4, "uniform"), (16, "uniform")]
    assert logged[0]["accuracy"] == figures["4"]["accuracy"]


def test_without_public_answers_there_are_answers_but_no_accuracy(runs, tmp_path):
    status, out, _, _ = runs(without=("--answers",))
    assert status == 0 and out.splitlines()[-1].split() == ["16", "-", "-", "-", "7/7"]
    assert read_outputs(tmp_path / "out", (16,))["figures"] == {}


def test_each_text_is_encoded_once(runs, monkeypatch):
    """35 options, seven different ones among them, whatever the number of frame counts."""
    seen = []
    monkeypatch.setattr(texts, "tokenize", lambda batch, **sizes: seen.extend(batch) or tokenize(batch, **sizes))
    assert runs("--frames", 4, 8, 16)[0] == 0
    assert len(set(seen)) == 7
    assert seen[:7] == list(dict.fromkeys(seen))  # after them, the padding of the last batch


def test_models_of_every_kind(data, runs, tmp_path):
    for name in ("TIMESFORMER_FROZEN_VITT16", "TIMEMAMBA_SPACETIME_VITT16", "CLIP_VITB16", "LAVILA_TSF_B16"):
        checkpoint = write_checkpoint(tmp_path / f"{name}.pt", name)
        status, out, errors, _ = runs("--pretrain-model", checkpoint, "--frames", 6, output=tmp_path / name)
        assert status == 0, errors


@pytest.mark.parametrize("name, style", [("ID4", ""), ("ID6", ""), ("VIT", "_legacy"), ("LAVILA", "_legacy")])
def test_checkpoints_in_released_layouts(runs, tmp_path, name, style):
    """As they are: upstream's names, sizes from the shapes, a vocabulary of 512 that CLIP's words are folded into."""
    more = ["--model-args", "num_heads=4", "text_heads=4", "--norm-style", f"openai{style}"]
    status, out, errors, log = runs("--resume", FIXTURES / f"{name}_checkpoint.pt", "--frames", 4, 20, *more)
    assert status == 0, log
    assert "vocabulary of 512" in log
    assert len(read_outputs(tmp_path / "out", (4, 20))["answers"][20]) == 7


def test_bf16_answers_are_near(runs, tmp_path):
    assert runs("--frames", 8, output=tmp_path / "exact")[0] == runs("--frames", 8, "--use-bf16")[0] == 0
    exact, rough = (read_outputs(tmp_path / name, (8,))["scores"] for name in ("exact", "out"))
    difference = max(abs(a - b) for uid in UIDS for a, b in zip(exact[uid]["8"], rough[uid]["8"], strict=True))
    assert 0 < difference < 0.03


# ---- videos that cannot be read ----------------------------------------------------------------


@pytest.fixture
def broken(data, tmp_path):
    """The videos but one that is missing (its answer is public) and one that is cut short (its is not)."""
    root = tmp_path / "videos"
    root.mkdir()
    for uid in UIDS:
        if uid != UIDS[1]:
            (root / f"{uid}.mp4").hardlink_to(data.root / f"videos/{uid}.mp4")
    (root / f"{UIDS[2]}.mp4").unlink()
    (root / f"{UIDS[2]}.mp4").write_bytes((data.root / f"videos/{UIDS[2]}.mp4").read_bytes()[:2000])
    return root


def test_unreadable_videos_are_listed_and_the_rest_stands(runs, broken, tmp_path):
    assert runs("--frames", 4, output=tmp_path / "whole")[0] == 0
    status, out, _, log = runs("--frames", 4, "--root", broken)
    assert status == 0
    assert f"{UIDS[1]}.mp4: no such file" in log and f"{UIDS[2]}.mp4" in log
    assert "2 of 7 videos cannot be read" in log
    whole, found = read_outputs(tmp_path / "whole", (4,)), read_outputs(tmp_path / "out", (4,))
    left = [uid for uid in UIDS if uid not in UIDS[1:3]]
    assert list(found["answers"][4]) == left and found["scores"] == {uid: whole["scores"][uid] for uid in left}
    assert len(found["tables"][4].splitlines()) == 6
    figures = found["figures"]["4"]
    assert (figures["total"], figures["unreadable"]) == (4, 1)
    report = json.loads((tmp_path / "out/egoschema_scores.json").read_text())
    assert set(report["unreadable"]) == set(UIDS[1:3])


def test_an_unreadable_video_is_tried_again_later(runs, broken, data):
    assert runs("--frames", 4, "--root", broken)[0] == 0
    for uid in UIDS[1:3]:
        (broken / f"{uid}.mp4").unlink(missing_ok=True)
        (broken / f"{uid}.mp4").hardlink_to(data.root / f"videos/{uid}.mp4")
    status, out, _, log = runs("--frames", 4, "--root", broken)
    assert "5 of them answered before" in log and out.split()[-1] == "7/7"


@pytest.mark.parametrize("workers", [0, 1])
def test_strict(fails, broken, workers):
    assert f"{UIDS[1]}.mp4: no such file" in fails("--strict", "--root", broken, "--workers", workers)


def _strict(rank, size, flags, output):
    return main_egoschema.main([*flags, "--output-dir", str(output), "--strict", "--frames", "4"])


def test_strict_ends_all_processes(data, broken, tmp_path):
    flags = [str(broken) if word == str(data.root / "videos") else word for word in data.flags]
    assert run_processes(_strict, 2, tmp_path / "log", flags, tmp_path / "out") == [2, 2]


def test_no_video_at_all(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    line = fails("--root", tmp_path / "empty")
    assert "no video can be read" in line and "--root" in line


# ---- overlap -----------------------------------------------------------------------------------


@pytest.fixture
def overlap(data, tmp_path):
    import pickle

    rows = [("ego1", 0.0, 1.0, "#C C opens it"), ("other", 0.0, 1.0, "#C C closes it"), ("ego1", 1.0, 2.0, "#C C sits")]
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(rows))
    return ["--uid-to-ego4d", data.root / "sources.json", "--pretrain-metadata", tmp_path / "train.pkl"]


def test_overlap_is_reported(runs, overlap, tmp_path):
    """ego1 is the source of videos 2 and 3."""
    status, _, _, log = runs("--frames", 4, *overlap)
    assert "overlap: 2 of 7 EgoSchema videos (of 1 Ego4D videos) lie in the pretraining narrations" in log
    assert read_outputs(tmp_path / "out", (4,))["figures"]["4"]["total"] == 5


def test_excluded_questions_are_in_no_accuracy_but_answered(data, runs, overlap, tmp_path):
    assert runs("--frames", 4, *overlap, "--exclude-overlap")[0] == 0
    found = read_outputs(tmp_path / "out", (4,))
    assert len(found["answers"][4]) == 7
    judged = {uid: answer for uid, answer in data.answers.items() if uid not in (UIDS[2], UIDS[3])}
    figures = found["figures"]["4"]
    assert figures["total"] == len(judged) == 4
    assert figures["correct"] == sum(found["answers"][4][uid] == answer for uid, answer in judged.items())


def test_overlap_flags_belong_together(fails, overlap):
    assert "give both" in fails(*overlap[:2])
    assert "--exclude-overlap: needs" in fails("--exclude-overlap")
    assert "--answers is missing" in fails("--exclude-overlap", *overlap, without=("--answers",))


# ---- submission --------------------------------------------------------------------------------


@pytest.fixture
def server():
    """What was posted to it; answers 200, or 503 where the path says so."""
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(503 if "busy" in self.path else 200)
            self.end_headers()
            self.wfile.write(b"Accuracy: 42.0")

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield posted, f"http://127.0.0.1:{httpd.server_port}/api/"
    httpd.shutdown()
    httpd.server_close()


def test_nothing_is_sent_unasked(runs, server):
    posted, url = server
    assert runs("--frames", 4, "--submit-url", url)[0] == 0
    assert posted == []


def _submit(rank, size, flags, output, url):
    words = ["--output-dir", str(output), "--frames", "4", "--submit", "--submit-url", url]
    return main_egoschema.main([*flags, *words])


def test_one_process_sends_once(data, server, tmp_path):
    posted, url = server
    assert run_processes(_submit, 2, tmp_path / "log", data.flags, tmp_path / "out", url) == [0, 0]
    assert posted == [("application/json", read_outputs(tmp_path / "out", (4,))["answers"][4])]


def test_the_reply_is_shown(runs, server):
    status, out, _, _ = runs("--frames", 4, "--submit", "--submit-url", server[1])
    assert status == 0 and out.splitlines()[-1] == "the server says: Accuracy: 42.0"


@pytest.mark.parametrize("address", ["busy", "closed"])
def test_a_failure_to_send_is_one_line_and_the_files_stay(fails, server, tmp_path, address):
    url = server[1] + "busy" if address == "busy" else "http://127.0.0.1:9/"
    line = fails("--frames", 4, "--submit", "--submit-url", url)
    assert f"sending to {url} failed" in line and ("503" in line or "refused" in line)
    assert len(read_outputs(tmp_path / "out", (4,))["answers"][4]) == 7


def test_an_incomplete_set_is_not_sent(fails, broken, server, tmp_path):
    line = fails("--frames", 4, "--root", broken, "--submit", "--submit-url", server[1])
    assert "nothing was sent, 2 of 7" in line and server[0] == []
    assert len(read_outputs(tmp_path / "out", (4,))["answers"][4]) == 5


# ---- bad input ---------------------------------------------------------------------------------


def test_flags_that_cannot_be_meant(fails):
    assert "--frames: found '0', expected a whole number from 1" in fails("--frames", 0)
    assert "give one" in fails("--frames", 4, 8, "--submit")
    assert "--submit-url ftp://x" in fails("--submit", "--submit-url", "ftp://x")
    assert "--pretrain-model: not given" in fails(without=("--pretrain-model",))
    assert "--max-tokens: found '-1', expected a whole number from 0" in fails("--max-tokens", -1)
    assert "--print-freq: found '0', expected a whole number from 1" in fails("--print-freq", 0)
    assert "--prompt 'Is it'" in fails("--prompt", "Is it")
    assert "only fields" in fails("--prompt", "{option.__class__}")
    assert "only fields" in fails("--prompt", "{option} {answer}")
    assert "only fields" in fails("--prompt", "{option!r}")
    assert "--prompt '{option'" in fails("--prompt", "{option")
    assert "did you mean --frames" in fails("--frame", 4)


def test_plain_braces_in_a_prompt():
    question = texts.Question("a", "Why {option}?", ("It {Rains}", "b", "c", "d", "e"))
    assert texts.option_texts(question, ["{{x}} {option}{question}"])[0] == ["{x} it {rains}Why {option}?"]


@pytest.mark.parametrize("flag", ["--root", "--questions", "--answers", "--pretrain-model"])
def test_missing_files(fails, tmp_path, flag):
    assert "nowhere" in fails(flag, tmp_path / "nowhere")


def test_answers_to_other_questions(fails, tmp_path):
    (tmp_path / "a.json").write_text('{"someone": 1}')
    assert "not among the questions" in fails("--answers", tmp_path / "a.json")


def test_a_checkpoint_of_a_classifier(fails, data, tmp_path):
    content = torch.load(data.checkpoint, weights_only=True)
    weights = {k: v for k, v in content["state_dict"].items() if k.startswith("visual") and "projection" not in k}
    weights |= {"fc_cls.weight": torch.zeros(9, 32), "fc_cls.bias": torch.zeros(9)}
    torch.save({**content, "state_dict": weights}, tmp_path / "cls.pt")
    line = fails("--pretrain-model", tmp_path / "cls.pt")
    assert "cls.pt" in line and "classifier" in line and "text tower" in line


def test_a_checkpoint_of_another_mean(fails):
    assert "--norm-style openai" in fails("--norm-style", "openai_legacy")


def test_features_that_are_not_finite(fails, data, tmp_path):
    content = torch.load(data.checkpoint, weights_only=True)
    content["state_dict"]["visual.image_projection"][0, 0] = float("inf")
    torch.save(content, tmp_path / "inf.pt")
    assert "not finite" in fails("--pretrain-model", tmp_path / "inf.pt", "--frames", 4)


def test_an_output_folder_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in fails(output=tmp_path / "file/out")


def test_long_texts_are_cut_and_counted(runs):
    _, _, _, log = runs("--frames", 4, "--prompt", "{question} " + "word " * 10 + "{option}")
    assert "35 of 35 texts fill the model's 24 tokens" in log


def test_main_can_be_started_as_a_script(data, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "main_egoschema.py"),
        *data.flags,
        "--frames",
        "4",
        "--output-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[-1] == "7/7"
