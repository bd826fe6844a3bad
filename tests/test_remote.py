"""Files in object stores: requests and their errors, local copies, credentials; against moto's server on loopback."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from avion import remote
from avion.errors import UserError
from avion.reading import file_exists, file_size, open_file, read_text
from avion.remote import Remote, check_address, fetch, is_remote, joined, neighbour, without_secrets
from tests.object_store import door_to, empty_bucket, running_store, surroundings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store():
    with running_store() as place:
        yield place


@pytest.fixture
def door(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with door_to(store, tmp_path / "cache", monkeypatch) as door:
        yield door


@pytest.fixture
def bucket(door):
    fs = empty_bucket("texts")
    fs.pipe_file("texts/a/one.csv", b"first,1\n")
    door.seen.clear()
    return fs


def gets(door):
    return [path for method, path in door.seen if method == "GET" and "one.csv" in path]


class TestAddresses:
    def test_what_is_remote(self):
        assert all(map(is_remote, ("s3://b/k", "memory://x", "gs://b")))
        assert not any(map(is_remote, ("a/b", "hf:o/r/f", "c:/x", "")))

    def test_paths_beside_and_below(self):
        assert joined("s3://b/k/", "x", "y.csv") == "s3://b/k/x/y.csv" and joined("a", "b") == "a/b"
        assert neighbour("s3://b/k/x.csv", "y.csv") == "s3://b/k/y.csv" and neighbour("k/x.csv", "y") == "k/y"

    @pytest.mark.parametrize(
        "address, secret",
        [
            ("ftp://me:hunter22@host/file", "hunter22"),
            ("https://host/file?X-Amz-Signature=abcdef01", "abcdef01"),
            ("https://host/file?a=1&sig=abcdef02", "abcdef02"),
        ],
    )
    def test_credentials_in_addresses_are_refused(self, address, secret):
        with pytest.raises(UserError, match="the address holds credentials") as caught:
            check_address(address)
        assert secret not in str(caught.value)
        with pytest.raises(UserError, match="the address holds credentials"):
            fetch(address)

    def test_texts_lose_what_is_secret(self, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
        text = without_secrets("proxy http://u:p@host said wJalrXUtnFEMI/K7MDENG at ?X-Amz-Signature=00ff&x=1")
        assert text == "proxy http://***@host said *** at ?X-Amz-Signature=***&x=1"


class TestCopies:
    def test_a_file_is_read_as_if_it_were_here(self, bucket, door):
        path = "s3://texts/a/one.csv"
        assert read_text(path) == "first,1\n" and file_size(path) == 8
        with open_file(path) as file:
            assert file.read() == b"first,1\n"
        assert len(gets(door)) == 1
        assert file_exists(path) and not file_exists("s3://texts/a/two.csv")

    def test_other_places(self, tmp_path, monkeypatch):
        import fsspec

        monkeypatch.setenv("AVION_CACHE", str(tmp_path / "cache"))
        fsspec.filesystem("memory").pipe_file("/words/x.txt", b"hello")
        assert read_text("memory://words/x.txt") == "hello"
        (tmp_path / "y.txt").write_text("there")
        assert read_text(f"file://{tmp_path}/y.txt") == "there"
        (tmp_path / "y.txt").write_text("anew")
        assert read_text(f"file://{tmp_path}/y.txt") == "anew"

    def test_a_changed_object_is_fetched_anew(self, bucket, door):
        assert read_text("s3://texts/a/one.csv") == "first,1\n"
        bucket.pipe_file("texts/a/one.csv", b"other,2\n")  # of the same size
        assert read_text("s3://texts/a/one.csv") == "other,2\n"
        assert len(gets(door)) == 2

    def test_an_object_that_changes_while_it_is_read(self, bucket, door):
        changes = [b"newer,3\n", b"newest,4\n"]

        def change(method, path):
            if method == "GET" and "one.csv" in path and changes:
                content = changes.pop(0)
                door.before = lambda *a: None
                bucket.pipe_file("texts/a/one.csv", content)
                door.before = change

        door.before = change
        assert read_text("s3://texts/a/one.csv") == "newest,4\n"

    def test_one_download_for_all_processes(self, bucket, door):
        bucket.pipe_file("texts/a/one.csv", os.urandom(300_000))
        context = multiprocessing.get_context("spawn")
        with context.Pool(3) as pool:
            paths = pool.map(fetch, ["s3://texts/a/one.csv"] * 6, chunksize=1)
        assert len(set(paths)) == 1 and os.path.getsize(paths[0]) == 300_000
        assert len(gets(door)) == 1

    def test_copies_stay_within_their_bound(self, bucket, door, monkeypatch):
        monkeypatch.setenv("AVION_CACHE_FILES_BYTES", "10000")
        monkeypatch.setattr(remote, "IN_USE_S", 0.0)
        for number in range(8):
            bucket.pipe_file(f"texts/{number}.txt", bytes(2000))
            path = fetch(f"s3://texts/{number}.txt")
            os.utime(path, (number, number))
        held = [file.name for file in Path(path).parent.iterdir() if not file.name.startswith(".")]
        assert sorted(name[-5:] for name in held) == ["4.txt", "5.txt", "6.txt", "7.txt"]

    def test_what_was_just_used_stays(self, bucket, door, monkeypatch):
        monkeypatch.setenv("AVION_CACHE_FILES_BYTES", "1000")
        paths = []
        for number in range(3):
            bucket.pipe_file(f"texts/{number}.txt", bytes(2000))
            paths.append(fetch(f"s3://texts/{number}.txt"))
        assert all(map(os.path.exists, paths))

    def test_a_bound_that_is_no_number(self, bucket, monkeypatch):
        monkeypatch.setenv("AVION_CACHE_FILES_BYTES", "4G")
        with pytest.raises(UserError, match="AVION_CACHE_FILES_BYTES 4G: a number of bytes is required"):
            fetch("s3://texts/a/one.csv")

    def test_in_a_fork(self, bucket):
        read_text("s3://texts/a/one.csv")  # connections are open
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(read_text, ["s3://texts/a/one.csv"]).get(timeout=60) == "first,1\n"


class TestErrors:
    def test_a_server_that_is_busy_for_a_while(self, bucket, door):
        door.refusals = 2
        assert read_text("s3://texts/a/one.csv") == "first,1\n"
        assert door.refusals == 0

    def test_a_server_that_stays_busy(self, bucket, door):
        door.refusals = 100
        with pytest.raises(OSError) as caught:
            read_text("s3://texts/a/one.csv")
        assert 100 - door.refusals == remote.ATTEMPTS and "\n" not in caught.value.strerror

    def test_a_server_that_does_not_answer(self, bucket, door, monkeypatch):
        monkeypatch.setattr(remote, "ANSWER_S", 0.3)
        door.silent = True
        began = time.monotonic()
        with pytest.raises(OSError, match="the server does not answer"):
            read_text("s3://texts/a/one.csv")
        assert time.monotonic() - began < 30

    def test_a_client_that_waits_for_ever(self, bucket, monkeypatch):
        monkeypatch.setattr(remote, "STALLED_S", 0.2)
        with pytest.raises(OSError, match="the server does not answer .nothing moved"):
            Remote("s3://texts").asked("s3://texts/x", lambda: time.sleep(5))

    def test_a_server_that_is_not_there(self, tmp_path, monkeypatch):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for name, value in surroundings(url, str(tmp_path)).items():
            monkeypatch.setenv(name, value)
        remote.forget_places()
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
        with pytest.raises(OSError, match="the server cannot be reached"):
            read_text("s3://texts/a/one.csv")

    def test_what_is_not_there(self, bucket):
        with pytest.raises(FileNotFoundError):
            read_text("s3://texts/a/gone.csv")
        with pytest.raises(FileNotFoundError):
            read_text("s3://texts/a")  # a folder
        with pytest.raises(OSError, match="[Nn]o such"):
            read_text("s3://no-bucket-of-this-name/x.csv")

    def test_no_credentials(self, bucket, tmp_path, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        remote.forget_places()
        with pytest.raises(PermissionError, match="no credentials that can be used .*AWS_PROFILE"):
            read_text("s3://texts/a/one.csv")

    @pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
    def test_wrong_credentials(self, bucket, door, code):
        door.refusals, door.status, door.code = 100, 403, code
        with pytest.raises(PermissionError, match="access is denied .*; check the credentials"):
            read_text("s3://texts/a/one.csv")
        assert door.refusals == 99  # nothing gets better by asking again

    def test_what_a_server_says_of_credentials_is_not_repeated(self, bucket):
        said = f"no: {os.environ['AWS_ACCESS_KEY_ID']}"

        def refuse():
            raise PermissionError(said)

        with pytest.raises(PermissionError, match=r"access is denied \(no: \*\*\*\)"):
            Remote("s3://texts").asked("s3://texts/x", refuse)

    def test_without_the_packages(self):
        code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["s3fs"] = None
from avion.errors import UserError
from avion.reading import read_text
try:
    read_text("s3://bucket/file")
except UserError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "need more packages" in done.stdout and "[remote]" in done.stdout, done.stderr


class TestWriting:
    def test_a_file_is_there_whole_or_not_at_all(self, bucket, door, tmp_path):
        (tmp_path / "big").write_bytes(bytes(1000))
        place = Remote("s3://texts")
        place.put(str(tmp_path / "big"), "s3://texts/new/big")
        assert bucket.cat_file("texts/new/big") == bytes(1000)
        place.copy("s3://texts/new/big", "s3://texts/new/again")
        place.remove("s3://texts/new/big")
        place.remove("s3://texts/new/big")
        place.forget()
        assert place.entries("s3://texts/new") == [("again", False)]

    def test_where_files_grow_under_their_name(self, tmp_path, monkeypatch):
        (tmp_path / "new").write_text("new")
        target = tmp_path / "folder" / "file"
        place = Remote(f"file://{tmp_path}")
        place.put(str(tmp_path / "new"), f"file://{target}")
        assert target.read_text() == "new"
        before = place.fs.mv
        monkeypatch.setattr(place.fs, "mv", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
        (tmp_path / "new").write_text("newer")
        with pytest.raises(PermissionError):
            place.put(str(tmp_path / "new"), f"file://{target}")
        monkeypatch.setattr(place.fs, "mv", before)
        assert target.read_text() == "new" and os.listdir(target.parent) == ["file"]

    def test_it_is_handed_to_other_processes(self, bucket):
        place = pickle.loads(pickle.dumps(Remote("s3://texts")))
        assert place.read("s3://texts/a/one.csv") == b"first,1\n"
