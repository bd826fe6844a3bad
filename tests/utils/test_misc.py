import csv
from types import SimpleNamespace

import pytest
import torch

from avion.data.demo import ensure_demo_dataset
from avion.errors import UserError
from avion.utils.misc import check_loss_nan, generate_label_map, interpolate_pos_embed
from tests.data.demo_case import SMALL
from tests.models.by_hand import bicubic_by_hand


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_ends_the_process(value):
    check_loss_nan(torch.tensor(3.0))
    with pytest.raises(SystemExit, match=f"the loss is {value}: training stops") as ending:
        check_loss_nan(torch.tensor(value))
    assert ending.value.code != 0


def like_videomae(patches, extra, tubelet=2):
    embed = SimpleNamespace(num_patches=patches, tubelet_size=tubelet)
    return SimpleNamespace(patch_embed=embed, pos_embed=torch.zeros(1, patches + extra, 4))


@pytest.mark.parametrize("extra", [0, 1])
def test_position_embeddings_of_another_grid(extra):
    """Eight frames in tubes of two: four grids of 3 x 3, each resized to 5 x 5 by itself."""
    old = torch.randn(1, extra + 4 * 9, 4)
    found = interpolate_pos_embed(old, like_videomae(4 * 25, extra), num_frames=8)
    assert torch.equal(found[:, :extra], old[:, :extra])
    for step in range(4):
        grid = old[0, extra + 9 * step :][:9].view(3, 3, 4).numpy()
        by_hand = torch.from_numpy(bicubic_by_hand(grid, 5, 5)).reshape(25, 4)
        torch.testing.assert_close(found[0, extra + 25 * step :][:25], by_hand.float(), atol=1e-5, rtol=1e-4)


def test_position_embeddings_that_fit_are_left_alone():
    old = torch.randn(1, 1 + 2 * 9, 4)
    assert interpolate_pos_embed(old, like_videomae(18, 1), num_frames=4) is old
    for frames in (4, 1):
        with pytest.raises(UserError, match="are not . square grids"):
            interpolate_pos_embed(torch.randn(1, 1 + 2 * 8, 4), like_videomae(18, 1), num_frames=frames)


def test_actions_and_what_is_said_of_them(tmp_path):
    paths = ensure_demo_dataset(tmp_path / "demo", seed=3, size=SMALL, workers=1)
    labels, numbers = generate_label_map("ek100_cls", paths.annotations)
    said = {}
    for path in (paths.action_train_csv, paths.action_validation_csv):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                said.setdefault(f"{row['verb_class']}:{row['noun_class']}", set()).add(row["narration"])
    assert numbers == {action: i for i, action in enumerate(sorted(said))}
    assert labels == [sorted(said[action]) for action in sorted(said)]
    with pytest.raises(UserError, match="'egtea' has no list of actions here"):
        generate_label_map("egtea")


def test_actions_lie_where_avion_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="datasets/EK100/epic-kitchens-100-annotations/EPIC_100_train.csv: no such file"
    ):
        generate_label_map("ek100_cls")
    folder = tmp_path / "datasets/EK100/epic-kitchens-100-annotations"
    folder.mkdir(parents=True)
    row = "P01_01_0,P01,P01_01,00:00:01.00,00:00:02.00\n"
    for split in ("train", "validation"):  # as the test split is, without classes
        header = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp\n"
        (folder / f"EPIC_100_{split}.csv").write_text(header + row)
    with pytest.raises(UserError, match="EPIC_100_train.csv: the column 'verb_class' is missing"):
        generate_label_map("ek100_cls")
