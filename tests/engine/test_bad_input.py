"""Every mistake is one line that says where, what and how to mend it; exit status 2; no traceback without --debug."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main_pretrain
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tiny_data, tmp_path):
    """A copy of the tiny dataset to break, and its flags."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data.root, root)
    return root


@pytest.fixture
def fails(tiny_flags, tiny_data, tmp_path, data, capsys):
    """Run the main job on the broken copy and return its one line."""

    def run(*more: str, drop: tuple[str, ...] = ()) -> str:
        words = [w.replace(str(tiny_data.root), str(data)) for w in tiny_flags if w not in drop]
        status = main_pretrain.main([*words, "--output-dir", str(tmp_path / "run"), *more])
        captured = capsys.readouterr()
        error = [line for line in captured.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d [IW] ", line)]
        assert status == 2, captured.err
        assert "Traceback" not in captured.err and captured.out == ""
        assert len(error) == 1, error
        assert error[0].startswith("main_pretrain.py: error: ")
        return error[0]

    return run


def test_unknown_model_names_the_near_ones(fails):
    assert "TIMEMAMBA_VITB16" in fails("--model", "TIMEMAMBA_B16")


def test_unknown_model_field(fails):
    line = fails("--model-args", "dept=2")
    assert "dept" in line and "depth" in line


def test_unknown_flag(fails):
    assert "unknown flag --bach-size: did you mean --batch-size" in fails("--bach-size", "4")


def test_unknown_yaml_key(fails, tmp_path):
    (tmp_path / "run.yaml").write_text("learning-rate: 1e-3\n")
    line = fails("--config", str(tmp_path / "run.yaml"))
    assert "run.yaml" in line and "learning-rate" in line


@pytest.mark.parametrize(
    "flag", ["--root", "--root-val", "--train-metadata", "--val-metadata", "--relevancy-path", "--resume", "--config"]
)
def test_missing_file_or_folder(fails, flag, tmp_path):
    line = fails(flag, str(tmp_path / "nowhere"))
    assert "nowhere" in line and re.search("no such|cannot be read", line)


def test_no_folder_of_evaluation_videos_is_told_before_training(fails, tmp_path):
    assert "--root-val" in fails("--root-val", str(tmp_path / "nowhere"))
    assert not (tmp_path / "run/steps.txt").exists()


def test_missing_sentence_list(fails, data):
    (data / "val_sentence.csv").unlink()
    assert "val_sentence.csv" in fails()


def test_csv_without_a_column(fails, data):
    text = (data / "val.csv").read_text()
    (data / "val.csv").write_text(text.replace("start_timestamp", "beginning", 1))
    line = fails()
    assert "val.csv" in line and "'start_timestamp' is missing" in line


def test_malformed_timestamp(fails, data):
    text = (data / "val.csv").read_text()
    (data / "val.csv").write_text(text.replace("00:00:02.50", "2.5 s", 1))
    line = fails()
    assert "val.csv" in line and "line 3" in line and "2.5 s" in line


def test_empty_csv(fails, data):
    header = (data / "val.csv").read_text().splitlines()[0]
    (data / "val.csv").write_text(header + "\n")
    assert "val.csv" in fails()


def test_empty_training_set(fails, data):
    (data / "train.pkl").write_bytes(pickle.dumps([]))
    assert "train.pkl" in fails()


def test_folder_without_videos(fails, data):
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    assert f"{data}/train" in fails()


def test_training_row_with_a_wrong_field(fails, data):
    (data / "train.pkl").write_bytes(
        pickle.dumps([("video0", 0.0, 1.0, "#C C opens the door"), ("video0", "x", 1.0, "a")])
    )
    line = fails()
    assert "train.pkl" in line and "start" in line and "1" in line


def test_relevancy_of_the_wrong_shape(fails, data):
    (data / "relevancy.pkl").write_bytes(pickle.dumps(np.zeros((7, 4))))
    line = fails()
    assert "relevancy.pkl" in line and "7 x 4" in line


def test_truncated_pickle(fails, data):
    content = (data / "train.pkl").read_bytes()
    (data / "train.pkl").write_bytes(content[: len(content) // 2])
    assert "train.pkl" in fails()


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["train.pkl", "relevancy.pkl"])
def test_pickle_that_would_run_code(fails, data, tmp_path, name):
    (data / name).write_bytes(pickle.dumps([Payload(f"touch {tmp_path}/executed")]))
    assert name in fails()
    assert not (tmp_path / "executed").exists()


def test_all_videos_corrupt(fails, data):
    for path in (data / "train").rglob("*.mp4"):
        if path.is_file():
            path.write_bytes(os.urandom(2000))
    line = fails("--workers", "1")
    assert re.search(r"train/video\d\.mp4/\d\.mp4", line)


def test_one_corrupt_video_with_strict_data(fails, data):
    video = data / "train/video2.mp4/0.mp4"
    video.write_bytes(video.read_bytes()[:900])
    assert "video2.mp4/0.mp4" in fails("--strict-data")


def test_one_corrupt_evaluation_video_with_strict_data(fails, data):
    video = data / "val/P01/P01_01.MP4/0.MP4"
    video.write_bytes(video.read_bytes()[:900])
    assert "P01_01.MP4/0.MP4" in fails("--strict-data", "--evaluate")


def test_no_evaluation_video_readable(fails, data):
    for path in (data / "val").rglob("*.MP4"):
        if path.is_file():
            path.write_bytes(b"")
    line = fails("--evaluate")
    assert "--root-val" in line and "no clip can be read" in line


@pytest.fixture
def checkpoint(tiny_flags, tmp_path_factory):
    """A checkpoint of the tiny run."""
    folder = tmp_path_factory.mktemp("trained")
    assert main_pretrain.main([*tiny_flags, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return folder / "checkpoint.pt"


def test_checkpoint_of_another_model(fails, checkpoint, capsys):
    capsys.readouterr()
    line = fails("--model", "TIMESFORMER_VITT16", "--resume", str(checkpoint))
    assert "checkpoint.pt" in line and "TIMEMAMBA" in line


def test_checkpoint_with_another_activation(fails, checkpoint, capsys):
    capsys.readouterr()
    words = [
        "act_layer=quick_gelu",
        "img_size=32",
        "embed_dim=32",
        "depth=2",
        "num_heads=2",
        "text_width=32",
        "text_heads=2",
        "text_layers=1",
    ]
    line = fails("--model-args", *words, "--resume", str(checkpoint))
    assert "checkpoint.pt" in line and "gelu" in line


def test_checkpoint_with_another_pixel_mean(fails, checkpoint, capsys):
    capsys.readouterr()
    line = fails("--norm-style", "openai_legacy", "--resume", str(checkpoint))
    assert "--norm-style openai" in line


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_checkpoint_cut_short(fails, checkpoint, tmp_path, capsys, kept):
    capsys.readouterr()
    content = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * kept)])
    assert "cut.pt" in fails("--resume", str(tmp_path / "cut.pt"))


def test_checkpoint_that_would_run_code(fails, tmp_path):
    torch.save({"state_dict": {}, "args": Payload(f"touch {tmp_path}/executed")}, tmp_path / "bad.pt")
    assert "bad.pt" in fails("--resume", str(tmp_path / "bad.pt"))
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_optimizer(fails, checkpoint, capsys):
    capsys.readouterr()
    assert "--optimizer sgd" in fails("--optimizer", "sgd", "--resume", str(checkpoint))


def test_batch_larger_than_the_dataset(fails):
    line = fails("--batch-size", "32")
    assert "larger than the dataset of 24" in line and "--batch-size" in line


def test_contradicting_precisions(fails):
    assert "--use-bf16 and --disable-amp contradict each other" in fails("--use-bf16", "--disable-amp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the error of a machine without GPUs")
def test_no_gpu(fails):
    assert "no GPU" in fails("--device", "cuda")


def test_initial_weights_that_are_not_there(fails):
    """Without network and cache: which file, and where to put it."""
    line = fails("--pretrain-zoo", "openai", "--model", "CLIP_VITB16", "--model-args", "img_size=224")
    assert "--pretrain-path" in line


def test_output_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in fails("--output-dir", str(tmp_path / "file" / "run"))


def test_debug_shows_the_traceback(tiny_flags, tmp_path):
    command = [sys.executable, str(ROOT / "main_pretrain.py"), *tiny_flags, "--model", "NOTHING", "--debug"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Traceback" in done.stderr and "UserError" in done.stderr


def start_processes(words_per_rank, folders, output):
    """One process per list of flags and working folder, as a launcher would start them; (status, stderr) of each."""
    port = free_port()
    jobs = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "main_pretrain.py"), *words, "--output-dir", str(output)],
            cwd=folder,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(words_per_rank)),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (words, folder) in enumerate(zip(words_per_rank, folders, strict=True))
    ]
    outputs = [job.communicate(timeout=200)[1] for job in jobs]
    return [(job.returncode, output) for job, output in zip(jobs, outputs, strict=True)]


def last_line(text):
    assert "Traceback" not in text, text
    return text.strip().splitlines()[-1]


def test_processes_that_disagree(tiny_flags, tmp_path):
    words = [tiny_flags, [*tiny_flags, "--lr", "2e-3"]]
    for status, output in start_processes(words, [tmp_path, tmp_path], tmp_path / "run"):
        assert status == 2
        assert "disagree on --lr (process 0: 0.001, process 1: 0.002)" in last_line(output)


def test_one_process_without_its_data_ends_all(tiny_flags, tiny_data, data, tmp_path):
    """The same flags, but the second process finds a broken file behind them: it says so, the first leaves with it."""
    (data / "train.pkl").write_bytes(b"")
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder, target in zip(folders, (tiny_data.root, data), strict=True):
        folder.mkdir()
        (folder / "seen").symlink_to(target)
    words = [w.replace(str(tiny_data.root), "seen") for w in tiny_flags]
    first, second = start_processes([words, words], folders, tmp_path / "run")
    assert (first[0], second[0]) == (2, 2)
    assert "stopped because reading the data failed on process 1" in last_line(first[1])
    assert "seen/train.pkl" in last_line(second[1])
