"""Videos: opening and decoding them, the packet index, the folders that they lie in.

`open_video` reads frames of one file, `VideoStore` clips of a folder of videos. docs/data.md describes both.
"""

from .errors import VideoError
from .index_file import INDEX_NAME
from .indexing import IndexSummary, index_videos
from .layout import LAYOUTS, VIDEO_EXTENSIONS, Layout, find_layout, list_videos
from .picture import Scaling
from .reader import DECODERS, VideoReader, open_video, resolve_decoder
from .sampling import SAMPLINGS, strided_frame_ids, uniform_frame_ids
from .scaler import compile_scaler
from .storage import is_remote
from .store import TOLERANCE_S, ClipFrames, VideoStore

__all__ = [
    "DECODERS",
    "INDEX_NAME",
    "LAYOUTS",
    "SAMPLINGS",
    "TOLERANCE_S",
    "VIDEO_EXTENSIONS",
    "ClipFrames",
    "IndexSummary",
    "Layout",
    "Scaling",
    "VideoError",
    "VideoReader",
    "VideoStore",
    "compile_scaler",
    "find_layout",
    "index_videos",
    "is_remote",
    "list_videos",
    "open_video",
    "resolve_decoder",
    "strided_frame_ids",
    "uniform_frame_ids",
]
