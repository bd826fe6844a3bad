"""The page in a real browser without a screen, and what its server hands out."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from avion.commands import search_videos as tool
from avion.search.moments import Moment
from tests.browser import chromium, needs_browser
from tests.search.case import write_data
from tests.videos import barcode_frame

ROOT = Path(__file__).resolve().parents[2]

# The routes of gradio, of this version and earlier ones, that take a path.
PREFIXES = (
    "gradio_api/file=", "gradio_api/file/", "file=", "file/", "moments/", "gradio_api/stream/", "static/", "assets/",
    "gradio_api/proxy=file://", "theme/", "upload/", "gradio_api/custom_component/",
)  # fmt: skip

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("data"))
    words = ["index", root / "videos", "--checkpoint", root / "checkpoint.pt", "--index", root / "index"]
    assert tool.main([*map(str, words), "--device", "cpu", "--workers", "0"]) == 0
    # Not in the index, but beside what is.
    shutil.copyfile(root / "videos/a.mp4", root / "videos/later.mp4")
    return root


@contextlib.contextmanager
def running(data, *flags):
    words = ["serve", "--index", data / "index", "--device", "cpu", "--port", "0", *flags]
    process = subprocess.Popen(
        [sys.executable, "tools/search_videos.py", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"search page: (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends it\)\n", line)
        assert found, line + process.stderr.read()
        yield found.group(1), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(data):
    with running(data) as (address, _):
        yield address


def get(url, path, method="GET", body=None, **headers):
    """The status and the body of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.putrequest(method, path, skip_host="host" in headers)
    text = json.dumps(body).encode() if body is not None else b""
    given = {"content-type": "application/json", "content-length": str(len(text)), **headers}
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders(text)
    response = connection.getresponse()
    return response.status, response.read().decode("utf-8", "replace")


def call(url, *values):
    """The last event of the search as gradio's programming interface gives it."""
    status, text = get(url, "/gradio_api/call/search", "POST", {"data": list(values)})
    assert status == 200, text
    return get(url, f"/gradio_api/call/search/{json.loads(text)['event_id']}")[1]


def tokens(url, *values):
    event = call(url, *values)
    assert "event: complete" in event, event
    return re.findall(r"/moments/([\w-]+)\.mp4", event)


# ---- what the server hands out ---------------------------------------------------------------------


def test_moments_by_token_alone(url):
    found = tokens(url, "a cloth", None, [], 3)
    assert len(found) == 3 == len(set(found))
    for extension, kind in (("mp4", "ftyp"), ("jpg", "JFIF")):
        status, text = get(url, f"/moments/{found[0]}.{extension}")
        assert status == 200 and kind in text[:16]
    status, text = get(url, f"/moments/{found[0]}.mp4", range="bytes=4-7")
    assert (status, text) == (206, "ftyp")
    for name in (found[0], f"{found[0]}.png", f"{found[0]}x.mp4", ".mp4", "a.mp4"):
        assert get(url, f"/moments/{name}")[0] == 404


@pytest.mark.parametrize("name", ["videos/later.mp4", "videos/a.mp4", "index/search.json", "checkpoint.pt"])
def test_no_file_by_its_path(url, data, name):
    path = data / name
    assert path.exists()
    quoted = urllib.parse.quote(str(path), safe="")
    relative = os.path.relpath(path, ROOT)
    secret = path.read_bytes()[:64].decode("utf-8", "replace")
    for prefix in PREFIXES:
        for shown in (str(path), quoted, relative, "../" * 12 + str(path)[1:], "..%2f" * 12 + quoted[3:]):
            status, text = get(url, f"/{prefix}{shown}")
            assert status in (400, 401, 403, 404, 405, 422) and secret not in text, (prefix, shown, status)


@pytest.mark.parametrize("name", ["README.md", "pyproject.toml", ".git", "/etc/passwd", "/proc/self/environ"])
def test_not_the_working_directory_nor_the_system(url, name):
    for prefix in ("gradio_api/file=", "file=", "moments/", "moments/../", "static/../", "assets/../../", "/"):
        status, text = get(url, f"/{prefix}{name}")
        assert status in (400, 403, 404), (prefix, status)
        assert "root:" not in text and "[project]" not in text


def test_a_query_cannot_be_a_file_of_the_server(url, data):
    """What a browser uploads is a query; a path that it makes up is not, in the place of any value."""
    for path in (data / "videos/later.mp4", Path("/etc/passwd"), ROOT / "README.md", "http://198.51.100.1/x.png", 7):
        made_up = {"path": str(path) if path != 7 else 7, "meta": {"_type": "gradio.FileData"}}
        for values in (["", made_up, [], 3], [made_up, None, [], 3], ["x", None, [{"deep": [made_up]}], 3]):
            for route in ("call/search", "queue/join", "run/search", "call/v2/search"):
                body = {"data": values, "fn_index": 0, "session_hash": "s"}
                status, text = get(url, f"/gradio_api/{route}", "POST", body)
                assert (status, text) == (403, "The query names a file that was not uploaded.")
    event = call(url, "", str(data / "videos/a.mp4"), [], 3)
    assert "event: error" in event and "/moments/" not in event


def test_bodies_that_are_no_queries(url):
    assert get(url, "/gradio_api/call/search", "POST", {"data": ["x" * (2 << 20)]})[0] == 413
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/gradio_api/call/search", "[" * 100_000)
    assert connection.getresponse().status == 400


def test_gradio_itself_refuses_what_was_not_uploaded(data, tmp_path, monkeypatch):
    """The second lock, with the first one taken away."""
    from starlette.testclient import TestClient

    from avion.engine.args import parse
    from avion.engine.options.search import ServeOptions
    from avion.search import page
    from avion.search.build import open_searcher

    monkeypatch.setattr(page, "_restrict", lambda app, uploads: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    options = parse(ServeOptions, ["--index", str(data / "index"), "--device", "cpu"], "serve", "")
    app = page.build_app(open_searcher(options), options, str(tmp_path))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for path in (data / "videos/later.mp4", Path("/etc/passwd")):
            made_up = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            asked = client.post("/gradio_api/call/search", json={"data": ["", made_up, [], 3]})
            event = client.get(f"/gradio_api/call/search/{asked.json()['event_id']}").text
            assert "event: error" in event and "/moments/" not in event
    assert not [p for p in tmp_path.rglob("*") if p.name in ("later.mp4", "passwd")]


def test_other_names_of_this_machine_are_refused(url):
    assert get(url, "/", host="evil.example")[0] == 400
    assert get(url, "/", host="localhost")[0] == 200


def test_only_this_machine_reaches_it(url):
    port = urllib.parse.urlsplit(url).port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no other address")
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError), socket.create_connection((own, port), timeout=5):
        pass


def test_headers(url):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert "default-src 'self'" in response.getheader("content-security-policy")
    assert response.getheader("x-content-type-options") == "nosniff"


def test_names_of_videos_are_text():
    from avion.search.page import _card

    card = _card(Moment('<img src=x onerror="alert(1)">', 3661.25, 3663.0, 0.5, 0.0, 2.0), "tok")
    assert "<img" not in card and "&lt;img src=x" in card and "1:01:01.2 – 1:01:03.0" in card


def test_mistakes_and_the_end(data, capsys):
    with running(data) as (address, process):
        port = urllib.parse.urlsplit(address).port
        words = ["serve", "--index", data / "index", "--device", "cpu", "--port", port]
        assert tool.main(list(map(str, words))) == 2
        assert f"--port {port}: cannot be listened on" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)


# ---- the browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("#query textarea, #query input")
    yield page
    page.close()


def ask(page, text):
    page.fill("#query textarea, #query input", text)
    page.click("#search")


def status(page):
    return page.inner_text("#status")


@needs_browser
def test_search_and_watch_in_a_browser(page, url):
    ask(page, "folds a cloth")
    page.wait_for_selector(".moment video")
    cards = page.query_selector_all(".moment")
    assert 1 < len(cards) <= 10
    assert re.fullmatch(r"\d+ moments out of 11 windows in \d+\.\d\d s", status(page))
    text = cards[0].inner_text()
    found = re.search(r"(0\.\d{3})\s+(0:00:0\d\.\d) – (0:00:0\d\.\d)\s+(a|deep/b)", text)
    assert found, text
    lasts = float(found.group(3)[5:]) - float(found.group(2)[5:])
    loaded = page.evaluate(
        """async () => {
            const video = document.querySelector('.moment video'), poster = new Image();
            poster.src = video.poster;
            await poster.decode();
            video.muted = true;
            await video.play();
            await new Promise(done => { video.ontimeupdate = () => video.currentTime > 0.2 && done(); });
            return {poster: poster.naturalWidth, width: video.videoWidth, length: video.duration,
                    at: video.currentTime, error: video.error && video.error.message};
        }"""
    )
    assert loaded["poster"] == 96 and loaded["width"] == 96 and loaded["error"] is None
    assert loaded["at"] > 0.2 and abs(loaded["length"] - lasts) < 0.2
    hosts = {urllib.parse.urlsplit(asked).netloc for asked in page.asked if asked.startswith("http")}
    # The browser's rules for this page keep all requests to other machines from leaving.
    reached = page.evaluate("performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert urllib.parse.urlsplit(url).netloc in hosts and set(reached) <= hosts


@needs_browser
def test_filters_and_files_in_a_browser(page, tmp_path):
    page.click("#videos input")
    page.keyboard.type("deep")
    page.keyboard.press("Enter")
    ask(page, "folds a cloth")
    page.wait_for_selector(".moment video")
    assert all("deep/b" in card.inner_text() for card in page.query_selector_all(".moment"))
    Image.fromarray(barcode_frame(205)).save(tmp_path / "frame.png")
    page.set_input_files("#file input[type=file]", str(tmp_path / "frame.png"))
    page.wait_for_selector("#file a, #file .file-preview")
    ask(page, "folds a cloth")
    page.wait_for_function("document.querySelector('#status').innerText.includes('remove one of them')")
    ask(page, "")
    page.wait_for_function("document.querySelector('#status').innerText.includes('moments out of')")
    assert "deep/b" in page.query_selector(".moment").inner_text()


@needs_browser
def test_mistakes_in_a_browser(page):
    ask(page, "")
    page.wait_for_function("document.querySelector('#status').innerText.includes('query: is empty')")
    assert page.query_selector(".moment") is None
