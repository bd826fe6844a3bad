"""That this room's checks find what is wrong, and nothing where nothing is: on the CPU, which needs no GPU."""

import subprocess
import sys

import pytest
import torch

from tests.gpu import kernels, pretraining


def test_the_cpus_backend_passes_every_check():
    for check in kernels.checks("cpu", "torch", toy=True):
        error, tensor = check.run()
        assert error <= check.tolerance, (check.name, tensor)


def test_on_a_gpu_the_widths_are_trainings():
    names = [check.name for check in kernels.checks("cpu", "torch")]  # not run
    assert len(names) == len(set(names)) == 3 * 3 * len(kernels.SHAPES) + 2
    assert "gated scan, 33 x 4, bfloat16" in names and (kernels.CHANNELS, kernels.STATES) == (768, 16)


@pytest.mark.parametrize(
    "function, kind",
    [("gated_bidirectional_scan", "gated scan"), ("selective_scan", "scan"), ("causal_conv_silu_both", "convolutions")],
)
def test_a_wrong_kernel_is_found_out(function, kind, monkeypatch):
    right = getattr(kernels, function)

    def wrong(*tensors, backend: str, **options):
        found = right(*tensors, backend=backend, **options)
        if backend == "reference":
            return found
        return tuple(t * 1.05 for t in found) if isinstance(found, tuple) else found * 1.05

    monkeypatch.setattr(kernels, function, wrong)
    checks = [check for check in kernels.checks("cpu", "torch", toy=True) if check.name.startswith(f"{kind}, ")]
    assert len(checks) == 3 and all(check.run()[0] > check.tolerance for check in checks)


def test_runs_that_differ_are_found_out(monkeypatch):
    right = kernels.gated_bidirectional_scan

    def noisy(*tensors, **options):
        found = right(*tensors, **options)
        return found + 1e-6 * torch.rand_like(found)

    monkeypatch.setattr(kernels, "gated_bidirectional_scan", noisy)
    (check,) = (c for c in kernels.checks("cpu", "torch", toy=True) if c.name.startswith("two runs"))
    assert check.run()[0] > check.tolerance


@pytest.fixture(scope="module")
def of_cpu(tmp_path_factory) -> list[float]:
    return pretraining.losses("fp32", "cpu", tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("mode", [mode for mode in pretraining.MODES if "compiled" not in mode])
def test_the_demo_pretrains_in_every_mode(mode, of_cpu, tmp_path):
    """Nine steps; those of the run that was stopped and resumed with ZeRO too."""
    losses = pretraining.losses(mode, "cpu", tmp_path / "run")
    assert len(losses) == 9 and losses[-1] < losses[0]
    assert pretraining.far_off(mode, losses, of_cpu) is None


def test_losses_that_are_far_off_are_named(of_cpu):
    assert "up to 10.0% from the CPU's losses" in pretraining.far_off("bf16", [1.1 * loss for loss in of_cpu], of_cpu)
    assert pretraining.far_off("fp32", of_cpu[:-1], of_cpu) == "8 steps, not 9"
    assert "not finite" in pretraining.far_off("fp32", [*of_cpu[:-1], float("nan")], of_cpu)
    assert "no progress" in pretraining.far_off("fp16, scaled", of_cpu[::-1], of_cpu)


def test_the_clips_are_drawn_by_their_script():
    pytest.importorskip("av.video.frame")  # which a stand-in has not
    import numpy as np

    from tests.gpu import make_clips

    with np.load(pretraining.CLIPS) as content:
        assert content["frames"].shape == (48, 4, 48, 48, 3) and content["tokens"].shape == (48, 16)
        for index in (0, 1, 31):
            frames, sentence = make_clips.draw(index)
            # Other versions of Pillow may draw and resize a little otherwise.
            assert np.abs(frames.astype(int) - content["frames"][index]).mean() < 3
            assert (make_clips.tokenize([sentence], 16).numpy() == content["tokens"][index]).all()


def test_machines_without_a_video_decoder_can_run_the_checks():
    program = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(lambda name, *a: None if name in ("av", "decord") else find(name, *a))
from tests.gpu import kernels, pretraining
import av
assert type(av).__name__ == "_Unusable" and issubclass(av.FFmpegError, Exception)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=pretraining.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
