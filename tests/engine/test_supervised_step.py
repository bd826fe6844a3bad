"""The gradients of a supervised step do not depend on how its batch is cut into processes and micro-batches."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from avion.engine.precision import Precision
from avion.engine.steps import supervised_step
from avion.models.model_clip import VideoClassifier
from tests.models.tiny import tiny_model
from tests.processes import run_processes

CLIPS = 12
FP32 = Precision("cpu", torch.float32)


def classifier():
    torch.manual_seed(5)
    return VideoClassifier(tiny_model("TIMEMAMBA_VITB16").visual, dropout=0.0, num_classes=7).train()


def loss(logits, batch):
    assert logits.dtype is torch.float32
    right = (logits.argmax(1) == batch["label"]).float().mean()
    return {"loss": F.cross_entropy(logits, batch["label"], label_smoothing=0.1), "acc1": right}


def micro(first, count, pieces, seed):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(CLIPS, 3, 4, 32, 32, generator=generator)
    label = torch.randint(7, (CLIPS,), generator=generator)
    size = count // pieces
    cuts = [slice(first + i * size, first + (i + 1) * size) for i in range(pieces)]
    return [{"video": video[cut], "label": label[cut]} for cut in cuts]


def run_step(model, micro_batches, precision=FP32, scale=lambda x: x):
    figures = supervised_step(model, micro_batches, loss, precision, scale)
    bare = getattr(model, "module", model)
    return {k: float(v) for k, v in figures.items()}, {n: p.grad.clone() for n, p in bare.named_parameters()}


def assert_same(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, grad in expected[1].items():
        difference = (actual[1][name] - grad).norm() / grad.norm().clamp_min(1e-8)
        assert difference < 2e-4, f"gradient of {name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_micro_batches_give_the_gradients_of_the_whole_batch(pieces):
    seed = int(torch.randint(10**6, ()))
    whole = run_step(classifier(), micro(0, CLIPS, 1, seed))
    (batch,), model = micro(0, CLIPS, 1, seed), classifier()
    by_hand = F.cross_entropy(model(batch["video"]), batch["label"], label_smoothing=0.1)
    by_hand.backward()
    assert_same(whole, (whole[0], {n: p.grad for n, p in model.named_parameters()}))
    assert whole[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert_same(run_step(classifier(), micro(0, CLIPS, pieces, seed)), whole)


def test_the_scale_reaches_the_gradients_and_not_the_figures():
    plain = run_step(classifier(), micro(0, CLIPS, 2, 3))
    scaled = run_step(classifier(), micro(0, CLIPS, 2, 3), scale=lambda x: 8 * x)
    assert_same((scaled[0], {n: g / 8 for n, g in scaled[1].items()}), plain)


def test_autocast_runs_the_model_in_bf16_and_the_loss_in_fp32():
    seen, model = [], classifier()
    model.visual.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    figures, _ = run_step(model, micro(0, 4, 1, 0), Precision("cpu", torch.bfloat16))  # `loss` asserts its input's type
    assert set(seen) == {torch.bfloat16} and figures["loss"] > 0


def _distributed_step(rank, size, pieces, seed):
    dist.init_process_group("gloo")
    model, share = DistributedDataParallel(classifier()), CLIPS // size
    exchanges = []

    def counted(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counted)
    figures, grads = run_step(model, micro(rank * share, share, pieces, seed))
    return figures, grads, exchanges


@pytest.mark.parametrize("size, pieces", [(2, 1), (3, 2)])
def test_processes_give_the_loss_and_gradients_of_one(size, pieces, tmp_path):
    seed = int(torch.randint(10**6, ()))
    whole = run_step(classifier(), micro(0, CLIPS, 1, seed))
    parts = run_processes(_distributed_step, size, tmp_path, pieces, seed)
    means = {name: sum(part[0][name] for part in parts) / size for name in whole[0]}
    for _, grads, exchanges in parts:  # DDP leaves the same gradients everywhere, having exchanged them once
        assert_same((means, grads), whole)
        assert len(set(exchanges)) == len(exchanges) > 0
