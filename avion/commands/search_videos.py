"""Search videos by a sentence, an image or a clip: make an index, ask it, or serve a page.

Examples:
    python tools/search_videos.py index videos/ --checkpoint runs/id6/checkpoint.pt --index search_index
    python tools/search_videos.py search "folds a cloth" --index search_index --template '#C C {}'
    python tools/search_videos.py search --image photo.jpg --json
    python tools/search_videos.py serve --index search_index

The same `index` command goes on where a run was stopped, and adds what is new in the folder. Exit status: 0 success,
1 some videos cannot be read, 2 a mistake in the flags or files.
"""

import json
import sys
from collections.abc import Sequence

from avion.engine.options.search import IndexOptions, SearchOptions, ServeOptions
from avion.engine.program import run_program
from avion.errors import UserError, called_names, exit_status, say

_PROGRAM = "tools/search_videos.py"
_COMMANDS = {
    "index": ("index FOLDER --checkpoint FILE", "make the index of a folder of videos, or bring it up to date"),
    "search": ('search "folds a cloth"', "print the moments that fit a sentence, an image or a clip"),
    "serve": ("serve", "serve a page to search and watch in"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] | None = None

    def choose() -> None:
        nonlocal rest
        if words[:1] in (["-h"], ["--help"]):
            print(called_names(_usage()))
            return
        if not words or words[0] not in _COMMANDS:
            found = f"unknown command {words[0]!r}" if words else "no command"
            raise UserError(f"{found}; give one of {', '.join(_COMMANDS)} (--help says more)")
        rest = words[1:]

    status = exit_status(_PROGRAM, choose)
    return status if rest is None else {"index": _index, "search": _search, "serve": _serve}[words[0]](rest)


def _usage() -> str:
    lines = [f"usage: {_PROGRAM} COMMAND [FLAGS]      COMMAND --help says more of a command", ""]
    lines += [f"  {form:<32}  {what}" for form, what in _COMMANDS.values()]
    lines += ["", "Every command takes --import MODULE, a module that registers models and mixers of your own."]
    return "\n".join(lines)


def _with_flag(words: list[str], flag: str) -> list[str]:
    """The words with the flag before a first word that has none."""
    return [flag, *words] if words and not words[0].startswith("-") else words


def _index(words: list[str]) -> int:
    errors: dict[str, str] = {}

    def body(options: IndexOptions) -> None:
        from avion.search.build import make_index

        report, index, left = make_index(options)
        errors.update(report.errors)
        if not report.is_main:
            return
        for video, error in errors.items():
            say(f"unreadable  {video}: {error}")
        if index is None:
            say(f"{options.index}: {left} videos are left to other jobs; the last one writes the index")
        else:
            say(f"{options.index}: {len(index.windows)} windows of {len(index.videos)} videos")

    doc = "Make the index of a folder of videos, or bring it up to date."
    status = run_program(body, IndexOptions, _with_flag(words, "--root"), f"{_PROGRAM} index", doc)
    return 1 if status == 0 and errors else status


def _search(words: list[str]) -> int:
    def body(options: SearchOptions) -> None:
        from avion.data.video import VideoError
        from avion.search.build import open_searcher
        from avion.search.moments import listed

        searcher = open_searcher(options)
        videos = searcher.videos_like(options.videos)
        try:
            if options.query:
                query = searcher.text(options.query)
            elif options.image:
                query = searcher.image(options.image)
            else:
                query = searcher.clip(options.clip, options.clip_start, options.clip_end)
        except VideoError as error:
            raise UserError(f"--clip {error}") from error
        moments, seconds = searcher.search(query, options.top, videos=videos, longest=options.longest)
        if options.json:
            asked = {"query": options.query or None, "image": options.image or None, "clip": options.clip or None}
            rows = [{"rank": i, **moment.as_dict()} for i, moment in enumerate(moments, 1)]
            told = {"index": options.index, "windows": len(searcher.index.windows), "seconds": round(seconds, 4)}
            print(json.dumps({**asked, **told, "moments": rows}, indent=1))
        else:
            say(*listed(moments))
            say(f"{len(searcher.index.windows)} windows of {len(searcher.index.videos)} videos in {seconds:.2f} s")

    doc = "Print the moments of the indexed videos that fit a sentence, an image or a clip."
    return run_program(body, SearchOptions, _with_flag(words, "--query"), f"{_PROGRAM} search", doc)


def _serve(words: list[str]) -> int:
    def body(options: ServeOptions) -> None:
        from avion.search.page import serve

        serve(options)

    return run_program(body, ServeOptions, words, f"{_PROGRAM} serve", "Serve a page to search and watch in.")
