"""Search in a million windows: blocks of a memory map in float16 against one product with all of it in float32.

    python benchmarks/bench_search.py [--windows 1000000] [--width 256] [--threads 2] [--folder /tmp]

Both sides find the ten best of the same rows in one process, in turn, and have to agree. The features of our side lie
in a file and are read through a memory map; the other side holds them in memory in float32, which takes twice the
room. The file is in the system's cache after the first query, as it is in a search that goes on. The ratio of the CPU
times, all threads together, says what a query costs whatever the machine; the seconds are those of this one.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.search.rank import similarities, top_k

_QUERIES, _BEST = 9, 10


def write_rows(path: Path, windows: int, width: int) -> None:
    """Unit rows (windows, width) float16, in pieces."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(windows, width))
    for first in range(0, windows, 65536):
        part = rng.standard_normal((min(65536, windows - first), width), dtype=np.float32)
        rows[first : first + 65536] = part / np.linalg.norm(part, axis=1, keepdims=True)
    rows.flush()


def timed(search, query: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(rows found, seconds, CPU seconds)"""
    wall, cpu = time.perf_counter(), time.process_time()
    found = search(query)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where the file of the features is written [a temporary folder]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "windows.npy"
        write_rows(path, args.windows, args.width)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        queries = np.random.default_rng(1).standard_normal((_QUERIES, args.width)).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        first = timed(lambda q: top_k(similarities(q, rows), _BEST), queries[0])[1]
        whole = torch.from_numpy(np.asarray(rows).astype(np.float32))
        ours, theirs = [], []
        for query in queries:
            a, *cost = timed(lambda q: top_k(similarities(q, rows), _BEST), query)
            ours.append(cost)
            b, *cost = timed(lambda q: torch.topk(whole @ torch.from_numpy(q), _BEST).indices.numpy(), query)
            theirs.append(cost)
            assert a.tolist() == b.tolist(), "the two sides differ"
    print(f"{args.windows} windows of {args.width} channels, {args.threads} threads, median of {_QUERIES} queries")
    print(f"the first query, which maps the file: {first:.3f} s")
    for name, costs in (("float16 in blocks, from the file", ours), ("float32, all in memory", theirs)):
        wall, cpu = (statistics.median(column) for column in zip(*costs, strict=True))
        print(f"{name:34} {wall:.3f} s, {cpu:.3f} CPU s")
    ratios = sorted(a[1] / b[1] for a, b in zip(ours, theirs, strict=True))
    print(f"ratio of CPU times {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
