"""A local page to search and watch videos: gradio makes the controls, and two routes serve excerpts and thumbnails.

Excerpts are named by random tokens, which the page gives out with its answers. No request names a path, so nothing can
be asked for but the moments that the page has given out. Gradio's own routes for files are closed. A query that names a
file which was not uploaded is refused before gradio sees it: where the page is mounted in another application, gradio
would copy such a file of the server, or a file of another machine, to the folder whose files it gives out.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from avion.data.video import VideoError
from avion.engine.options.search import ServeOptions
from avion.errors import UserError

from .build import open_searcher
from .excerpts import Excerpts
from .moments import Moment, clock
from .searcher import Searcher, is_image

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_MOST_TOKENS = 10_000
_MOST_NAMES = 2_000  # videos in the list of the filter; other names can be typed
_LARGEST_UPLOAD = "500mb"
_LARGEST_BODY = 1 << 20  # bytes of a query, which names uploaded files
_CLOSED = re.compile(r"file=|proxy=|/(file|stream|proxy|custom_component|deep_link|monitoring)(/|$)", re.IGNORECASE)
# Nothing is fetched from other machines: gradio's page would ask for fonts and a script.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'self'"
)
_STYLE = """
.moments { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 16px; }
.moment video { width: 100%; aspect-ratio: 16 / 9; background: #000; border-radius: 6px; }
.moment p { margin: 4px 0 0 0; overflow-wrap: anywhere; }
"""


class Moments:
    """The moments that were given out, by token."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Moment] = OrderedDict()
        self._lock = threading.Lock()

    def token(self, moment: Moment) -> str:
        """Return a new token for a moment."""
        token = secrets.token_urlsafe(18)
        with self._lock:
            self._known[token] = moment
            while len(self._known) > _MOST_TOKENS:
                self._known.popitem(last=False)
        return token

    def get(self, token: str) -> Moment | None:
        """Return the moment of a token; None if the token was not given out."""
        with self._lock:
            return self._known.get(token)


def serve(options: ServeOptions) -> None:
    """Serve the page until the program is stopped.

    Args:
        options: The flags.

    Raises:
        UserError: gradio is not installed, the index or the checkpoint cannot be read, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("serve: needs the package gradio; `pip install 'avion-timemamba[search]'` mends it")
    import uvicorn

    searcher = open_searcher(options)
    listening = _listen(options.host, options.port)
    with listening, tempfile.TemporaryDirectory(prefix="avion-search-") as folder:
        app = build_app(searcher, options, folder)
        port = listening.getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        print(f"search page: http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        if not is_loopback(options.host):
            print(f"--host {options.host}: everyone who reaches this machine can search and watch", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Return whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened on ({error.strerror}); give others") from None
    return listening


def build_app(searcher: Searcher, options: ServeOptions, folder: str) -> FastAPI:
    """Build the application: gradio's page at /, excerpts at /moments/TOKEN.mp4, thumbnails at /moments/TOKEN.jpg.

    Args:
        searcher: Answers queries.
        options: The flags of the command.
        folder: A folder for excerpts and uploads.

    Returns:
        The application.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    uploads = os.path.join(os.path.realpath(folder), "uploads")
    os.environ["GRADIO_TEMP_DIR"] = uploads
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    os.makedirs(os.path.join(folder, "excerpts"), exist_ok=True)
    excerpts, moments = Excerpts(searcher.index.finder(), os.path.join(folder, "excerpts")), Moments()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, excerpts, moments)
    _restrict(app, uploads)
    if is_loopback(options.host):  # a page of another site must not reach this one under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    blocks = _blocks(searcher, options, moments)
    blocks.has_launched = True  # or gradio does not check where files of queries lie
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=_LARGEST_UPLOAD,
        css=_STYLE,
        footer_links=[],
    )


def _restrict(app: FastAPI, uploads: str) -> None:
    """Close gradio's routes for files, and refuse queries that name other files than those below `uploads`."""
    from fastapi.responses import PlainTextResponse
    from starlette.requests import Request

    async def refusal(request: Request) -> PlainTextResponse | None:
        path = request.url.path
        if _CLOSED.search(urllib.parse.unquote(path)):
            return PlainTextResponse("Files are not served.", status_code=403)
        if request.method in ("GET", "HEAD") or path.endswith("/upload"):
            return None
        if int(request.headers.get("content-length") or _LARGEST_BODY + 1) > _LARGEST_BODY:
            return PlainTextResponse("The query is too large.", status_code=413)
        try:
            body = json.loads(await request.body() or b"null")
        except (ValueError, RecursionError):
            return PlainTextResponse("The query is no JSON.", status_code=400)
        if all(_is_below(path, uploads) for path in _paths_in(body)):
            return None
        return PlainTextResponse("The query names a file that was not uploaded.", status_code=403)

    @app.middleware("http")
    async def restrict(request: Request, call_next: Any) -> Any:
        response = await refusal(request) or await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _paths_in(body: Any) -> Iterator[Any]:
    """Iterate over the values of all keys `path` in JSON, at any depth."""
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "path")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_below(path: Any, folder: str) -> bool:
    if not isinstance(path, str) or "\0" in path:
        return False
    return os.path.realpath(path).startswith(folder + os.sep)


def _add_routes(app: FastAPI, excerpts: Excerpts, moments: Moments) -> None:
    from fastapi.responses import FileResponse, PlainTextResponse

    def moment_file(name: str) -> Any:  # not async: it decodes, which must not hold up other requests
        token, _, extension = name.rpartition(".")
        moment = moments.get(token) if extension in ("mp4", "jpg") else None
        if moment is None:
            return PlainTextResponse("There is no such moment; search again.", status_code=404)
        try:
            if extension == "mp4":
                return FileResponse(excerpts.clip(moment.video, moment.start, moment.end), media_type="video/mp4")
            picture = excerpts.thumbnail(moment.video, moment.peak_start, moment.peak_end)
            return FileResponse(picture, media_type="image/jpeg")
        except (VideoError, UserError) as error:
            logger.warning("excerpt: %s", error)
            return PlainTextResponse("The video cannot be read any more; the server's log says why.", status_code=410)

    app.add_api_route("/moments/{name}", moment_file, methods=["GET", "HEAD"])


def _blocks(searcher: Searcher, options: ServeOptions, moments: Moments) -> Any:
    import gradio

    index = searcher.index
    title = f"Search in {len(index.videos)} videos"
    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {title}")
        with gradio.Row(equal_height=True):
            sentence = gradio.Textbox(
                label="What the moments show", placeholder="folds a cloth", scale=5, elem_id="query", autofocus=True
            )
            button = gradio.Button("Search", variant="primary", scale=1, elem_id="search")
        with gradio.Row():
            file = gradio.File(label="Or an image or a clip", type="filepath", height=170, elem_id="file")
            videos = gradio.Dropdown(
                index.videos[:_MOST_NAMES],
                multiselect=True,
                allow_custom_value=True,
                elem_id="videos",
                label="Only in videos of these names",
                info="A part of a name will do.",
            )
            count = gradio.Slider(1, max(50, options.top), options.top, step=1, label="Moments")
        status = gradio.Markdown(elem_id="status")
        results = gradio.HTML(elem_id="results")
        answer = functools.partial(_answer, searcher, moments, options)
        gradio.on(
            [button.click, sentence.submit],
            answer,
            [sentence, file, videos, count],
            [status, results],
            api_name="search",
        )
    return blocks


def _answer(
    searcher: Searcher,
    moments: Moments,
    options: ServeOptions,
    sentence: str | None,
    file: str | None,
    videos: Sequence[str] | None,
    count: float,
) -> tuple[str, str]:
    """Return the status line and the moments as HTML."""
    try:
        if (sentence or "").strip() and file:
            raise UserError("a sentence and a file are given; remove one of them")
        chosen = searcher.videos_like(videos or [])
        if file and not _is_below(file, os.path.realpath(os.environ["GRADIO_TEMP_DIR"])):
            raise UserError("the file was not uploaded")
        if file:
            query = searcher.image(file) if is_image(file) else searcher.clip(file)
        else:
            query = searcher.text(sentence or "")
        found, seconds = searcher.search(query, int(count), videos=chosen, longest=options.longest)
    except (UserError, VideoError) as error:
        shown = str(error).replace(str(file), "the file") if file else str(error)
        return html.escape(shown), ""
    status = f"{len(found)} moments out of {len(searcher.index.windows):,} windows in {seconds:.2f} s"
    return status, f'<div class="moments">{"".join(_card(m, moments.token(m)) for m in found)}</div>'


def _card(moment: Moment, token: str) -> str:
    """Return a moment as HTML. The name of a video may hold anything."""
    return (
        f'<div class="moment"><video controls preload="none" poster="/moments/{token}.jpg" src="/moments/{token}.mp4">'
        f"</video><p><b>{moment.score:.3f}</b> &nbsp; {clock(moment.start)} – {clock(moment.end)}</p>"
        f"<p>{html.escape(moment.video)}</p></div>"
    )
