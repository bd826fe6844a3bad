"""Damage to a checkpoint is noticed when the file is opened, wherever it is."""

import shutil

import pytest
import torch

from avion.errors import UserError
from avion.weights import Checkpoint, load_checkpoint
from avion.weights.integrity import check_integrity

WEIGHTS = {f"visual.block{i}.weight": (torch.arange(3000.0) * (i + 1)).reshape(50, 60) for i in range(8)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path)
    return path


def overwrite(path, offset, data):
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(data)


def is_as_written(path):
    """Whether the file opens, and if so, holds what was written."""
    try:
        found = Checkpoint.open(path)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return None
    return found.contents["epoch"] == 3 and all(torch.equal(found.weights[name], w) for name, w in WEIGHTS.items())


def test_zeros_in_the_middle_of_the_weights(file):
    overwrite(file, file.stat().st_size // 2, bytes(512))
    with pytest.raises(UserError, match=r"the file is damaged \(the checksum of its record '.*/data/\d+' is wrong\)"):
        Checkpoint.open(file)
    Checkpoint.open(file, verify=False)  # which is why the checksums are looked at


def test_damage_anywhere_is_noticed_or_harmless(file, tmp_path, rng):
    """Flipped bits, runs of zeros, pieces of other data, a lost end: the weights are never others than written."""
    size, noticed = file.stat().st_size, 0
    for number in range(200):
        copy = tmp_path / "copy.pt"
        shutil.copy(file, copy)
        offset, kind = int(rng.integers(size)), number % 4
        if kind == 0:
            byte = file.read_bytes()[offset]
            overwrite(copy, offset, bytes([byte ^ (1 << int(rng.integers(8)))]))
        elif kind == 3:
            with open(copy, "rb+") as short:
                short.truncate(offset)
        else:
            length = min(int(rng.integers(1, 4096)), size - offset)
            overwrite(copy, offset, bytes(length) if kind == 1 else rng.bytes(length))
        found = is_as_written(copy)
        assert found is not False, f"kind {kind} at {offset} of {size}: other weights were read"
        noticed += found is None
    assert noticed > 140


def test_records_that_say_other_sizes_than_their_headers(file, tmp_path):
    """A local header whose extra field has another length moves the data that PyTorch reads."""
    content = file.read_bytes()
    header = content.index(b"PK\x03\x04", 100)
    changed = bytearray(content)
    changed[header + 28] ^= 1
    (tmp_path / "copy.pt").write_bytes(changed)
    assert is_as_written(tmp_path / "copy.pt") is None


def test_a_file_without_checksums_is_taken_as_it_is(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": WEIGHTS, "epoch": 3}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_as_written(tmp_path / "a.pt")


def test_a_damaged_file_of_the_older_format_that_is_cut_short(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert is_as_written(path)
    for size in (path.stat().st_size - 1, path.stat().st_size // 2, 300):
        with open(path, "rb+") as file:
            file.truncate(size)
        assert is_as_written(path) is None


def test_a_large_file_is_checked_in_little_memory(tmp_path):
    import tracemalloc

    torch.save({"state_dict": {"w": torch.ones(1 << 24)}}, tmp_path / "a.pt")
    with open(tmp_path / "a.pt", "rb") as file:
        tracemalloc.start()
        check_integrity(file, tmp_path / "a.pt")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_weights_are_not_loaded_from_a_damaged_file(file):
    model = torch.nn.Linear(2, 2)
    overwrite(file, file.stat().st_size // 2, bytes(512))
    with pytest.raises(UserError, match="the file is damaged"):
        load_checkpoint(model, file)


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    """A run writes its next checkpoint under the same name; what is returned is one of the two, checked."""
    path, later = tmp_path / "checkpoint.pt", tmp_path / "later.pt"
    torch.save({"state_dict": {"w": torch.zeros(100)}}, path)
    torch.save({"state_dict": {"w": torch.ones(200)}}, later)
    damaged = bytearray(later.read_bytes())
    place = damaged.index(torch.ones(200).numpy().tobytes())
    damaged[place + 40 : place + 80] = bytes(40)
    (tmp_path / "damaged.pt").write_bytes(damaged)
    load = torch.load

    def slow_load(*args, **kwargs):
        if (tmp_path / "next").exists():
            (tmp_path / "next").replace(path)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", slow_load)
    shutil.copy(later, tmp_path / "next")
    assert Checkpoint.open(path).weights["w"].tolist() == [1.0] * 200
    shutil.copy(tmp_path / "damaged.pt", tmp_path / "next")
    with pytest.raises(UserError, match=r"checkpoint\.pt: the file is damaged"):
        Checkpoint.open(path)
