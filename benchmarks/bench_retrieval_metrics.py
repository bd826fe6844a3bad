"""Retrieval metrics (mAP and nDCG, both directions) against the usual whole-matrix NumPy code.

    python benchmarks/bench_retrieval_metrics.py [--clips 9668] [--sentences 3842] [--dtype float32]

Both sides score the same matrices in one process, one after the other, and must agree. One sort of the similarities,
`np.argsort(similarities, axis=1)`, runs in turn with our side: the ratio of their CPU times, all threads together, says
what the metrics cost on any machine. Each side runs once more in a process of its own, which reports its peak memory.
The sizes are those of EPIC-KITCHENS-100's retrieval test split, and the relevancies are drawn to be like the dataset's:
half a point for the verb class, half for the overlap of the nouns, a ninth of them above zero.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.evaluation.ek100_mir import retrieval_metrics


def make_case(clips: int, sentences: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return similarities of `dtype` and float32 relevancies, (clips, sentences) each."""
    rng = np.random.default_rng(0)
    # A few classes make up much of the annotations: class c is drawn in proportion to 1 / (c + 1).
    verb, noun, second = (
        rng.choice(len(weights), sentences, p=weights / weights.sum())
        for weights in (1 / np.arange(1, classes + 1) for classes in (97, 300, 300))
    )
    second = np.where(rng.random(sentences) < 0.2, second, noun)  # one in five has two nouns
    of_clip = np.arange(clips) % sentences  # every clip's narration is among the sentences
    count = 1 + (second != noun)
    relevancy = np.empty((clips, sentences), np.float32)
    for clip, own in enumerate(of_clip):
        shared = ((noun == noun[own]) | (second == noun[own])).astype(int)
        if count[own] == 2:
            shared += (noun == second[own]) | (second == second[own])
        relevancy[clip] = 0.5 * (verb == verb[own]) + 0.5 * shared / (count + count[own] - shared)
    similarity = rng.random((clips, sentences), dtype=np.float32)
    similarity += 0.3 * relevancy
    return similarity.astype(dtype, copy=False), relevancy


def whole_matrix_metrics(similarity: np.ndarray, relevancy: np.ndarray) -> dict[str, float]:
    """Compute the same metrics as they are usually written: sort, gather and accumulate the whole matrix."""
    figures = {}
    for side, s, r in (("vis", similarity, relevancy), ("txt", similarity.T, relevancy.T)):
        ap = whole_matrix_ap(s, r)
        counted = (np.sort(r, axis=1)[:, ::-1] > 0).astype(int)
        ndcg = whole_matrix_dcg(s, r, counted) / whole_matrix_dcg(r, r, counted)
        figures |= {f"{side}_map": ap.mean(), f"{side}_ndcg": ndcg.mean()}
    for name in ("map", "ndcg"):
        figures[f"avg_{name}"] = (figures[f"vis_{name}"] + figures[f"txt_{name}"]) / 2
    return {name: float(value) for name, value in figures.items()}


def whole_matrix_ap(similarity: np.ndarray, relevancy: np.ndarray) -> np.ndarray:
    order = np.argsort(-similarity, axis=1, kind="stable")
    ranked = relevancy[np.arange(len(relevancy))[:, None], order].astype(np.float64)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, ranked.shape[1] + 1)
    precision[ranked != 1] = 0
    return np.sum(precision, axis=1) / np.sum(ranked == 1, axis=1)


def whole_matrix_dcg(similarity: np.ndarray, relevancy: np.ndarray, counted: np.ndarray) -> np.ndarray:
    order = np.argsort(-similarity, axis=1, kind="stable")
    ranked = relevancy[np.arange(len(relevancy))[:, None], order].astype(np.float64)
    discount = np.repeat(np.log2(np.arange(2, ranked.shape[1] + 2))[None], len(ranked), axis=0)
    return np.sum(ranked * counted / discount, axis=1)


SIDES = {"ours": retrieval_metrics, "whole matrix": whole_matrix_metrics}


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def print_peak(side: str, case: tuple) -> None:
    """Print, in a process of its own, the peak before the metrics and the peak after them, with the inputs in both."""
    inputs = make_case(*case)
    before = peak_mib()
    SIDES[side](*inputs)
    print(json.dumps((before, peak_mib())))


def compare(case: tuple, repeats: int) -> None:
    # This comes first, because the peak of a child process starts from what its parent occupies.
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--peak-of", side, *map(str, _case_flags(case))]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side] = json.loads(out)
    similarity, relevancy = make_case(*case)
    print(f"{case[0]} clips x {case[1]} sentences, {case[2]}, {np.mean(relevancy > 0):.1%} above zero")
    work = {
        "ours": lambda: retrieval_metrics(similarity, relevancy),
        "argsort": lambda: np.argsort(similarity, axis=1),
        "whole matrix": lambda: whole_matrix_metrics(similarity, relevancy),
    }
    runs: dict[str, list[tuple[float, float]]] = {side: [] for side in work}
    figures = {}
    for number in range(repeats):
        for side in work if number == 0 else ("ours", "argsort"):
            figures[side], *times = timed(work[side])
            runs[side].append(tuple(times))
    for name, value in figures["ours"].items():
        np.testing.assert_allclose(value, figures["whole matrix"][name], rtol=1e-9)
    wall, cpu = ({side: statistics.median(t[i] for t in times) for side, times in runs.items()} for i in range(2))
    for side in work:
        memory = ", peak {1:5.0f} MiB, {0:.0f} of them before it starts".format(*peaks[side]) if side in peaks else ""
        print(f"{side:>12}: {wall[side]:6.2f} s, {cpu[side]:6.2f} s of CPU time{memory}")
    print(
        f"{'ratio':>12}: {wall['whole matrix'] / wall['ours']:6.1f} x the speed of the whole matrix, "
        f"{cpu['whole matrix'] / cpu['ours']:.1f} x in CPU time; the figures agree to 1e-9"
    )
    ratios = sorted(ours[1] / sort[1] for ours, sort in zip(runs["ours"], runs["argsort"], strict=True))
    print(
        f"{'of argsort':>12}: {cpu['ours'] / cpu['argsort']:6.2f} x the CPU time of np.argsort(similarities, axis=1) "
        f"(medians of {repeats}; in pairs {ratios[0]:.2f} to {ratios[-1]:.2f}), load average {os.getloadavg()[0]:.1f}"
    )


def timed(work) -> tuple:
    """Return the result of `work`, the seconds, and the seconds of CPU time of all threads."""
    start = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start[0], time.process_time() - start[1]


def _case_flags(case: tuple) -> list:
    return ["--clips", case[0], "--sentences", case[1], "--dtype", case[2]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=9668)
    parser.add_argument("--sentences", type=int, default=3842)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours and of argsort, in turn; medians")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    case = (args.clips, args.sentences, args.dtype)
    if args.peak_of:
        print_peak(args.peak_of, case)
    else:
        compare(case, args.repeats)


if __name__ == "__main__":
    main()
