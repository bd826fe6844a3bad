"""An S3 on loopback for tests: moto's server, and before it a door that can be made to fail."""

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from avion import remote


class Door:
    """Hands requests on to a server, in this process.

    Attributes:
        seen: (method, path) of the requests so far.
        refusals: How many of the next requests get the answer `status`, with the error `code`.
        silent: Whether requests get no answer, and wait until it is False.
        before: Is called with method and path before a request is handed on.
        after: Is called with method and path once the server has answered, before the answer is handed on.
    """

    def __init__(self, host: str, port: int):
        self.seen: list[tuple[str, str]] = []
        self.refusals = 0
        self.status, self.code = 503, "SlowDown"
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.after: Callable[[str, str], None] = lambda method, path: None
        self._speaks = threading.Event()
        self._speaks.set()
        self.lock = threading.Lock()
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                door.seen.append((self.command, self.path))
                if not door._speaks.wait(60):
                    return
                with door.lock:
                    refused = door.refusals > 0
                    door.refusals -= refused
                if refused:
                    self._answer(door.status, [], f"<Error><Code>{door.code}</Code></Error>".encode())
                    return
                door.before(self.command, self.path)
                server = http.client.HTTPConnection(host, port, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                found = server.getresponse()
                content = found.read()
                door.after(self.command, self.path)
                self._answer(found.status, found.getheaders(), content)
                server.close()

            def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = dict((name.lower(), value) for name, value in headers).get("content-length", "0")
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                """A client that was killed is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def silent(self) -> bool:
        return not self._speaks.is_set()

    @silent.setter
    def silent(self, value: bool) -> None:
        if value:
            self._speaks.clear()
        else:
            self._speaks.set()

    def close(self) -> None:
        self.silent = False
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def running_store() -> Iterator[tuple[str, int]]:
    """moto's server: its host and port, until the block is left."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        yield host, port
    finally:
        running.stop()


def surroundings(url: str, cache: str) -> dict[str, str]:
    """The environment of a client of the server at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test-key-that-is-secret",
        "AWS_SECRET_ACCESS_KEY": "test-secret-that-is-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AVION_CACHE": cache,
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def door_to(store, cache, monkeypatch):
    """An open door to a running store; clients of this test go through it and keep their copies in `cache`."""
    door = Door(*store)
    try:
        for name, value in surroundings(door.url, str(cache)).items():
            monkeypatch.setenv(name, value)
        remote.forget_places()
        yield door
    finally:
        door.close()


def empty_bucket(name: str):
    """A bucket without anything in it. Returns s3fs's file system."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    if fs.exists(name):
        fs.rm(name, recursive=True)
    fs.mkdir(name)
    return fs
