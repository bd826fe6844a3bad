"""From an evaluation of retrieval to the file for the server."""

import pickle
import zipfile

import numpy as np

import main_finetune_retrieval
from avion.commands.make_submission import main as make_submission
from tests.engine.actions import pretrained


def test_similarities_become_a_submission(mir_flags, tmp_path, capsys):
    pretrained(tmp_path / "model.pt", vocab_size=49408)
    words = [*mir_flags, "--evaluate", "--resume", str(tmp_path / "model.pt")]
    assert main_finetune_retrieval.main([*words, "--similarity-filename", str(tmp_path / "out" / "s.npy")]) == 0
    clips = mir_flags[mir_flags.index("--val-metadata") + 1]
    files = [tmp_path / "out" / "s.npy", clips, clips.replace(".csv", "_sentence.csv"), tmp_path / "r.zip"]
    assert make_submission(["retrieval", *map(str, files)]) == 0
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        sent = pickle.loads(archive.read("test.pkl"))
    similarity = np.load(tmp_path / "out" / "s.npy")
    assert sent["sim_mat"].tolist() == similarity.tolist() and len(sent["vis_ids"]) == len(similarity) == 7
    assert 0 <= similarity.min() < similarity.max() <= 1 and similarity.shape[1] == len(sent["txt_ids"])


def test_a_name_that_is_no_npy(mir_flags, tmp_path, capsys):
    words = [*mir_flags, "--evaluate", "--similarity-filename", str(tmp_path / "s.txt"), "--output-dir", str(tmp_path)]
    assert main_finetune_retrieval.main(words) == 2
    assert "--similarity-filename" in capsys.readouterr().err
