"""The gradients of a step do not depend on how its batch is cut into processes and micro-batches."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from avion.engine.precision import Precision
from avion.engine.steps import contrastive_step
from avion.losses import ClipLoss
from avion.models import create_model
from tests.processes import run_processes

CLIPS = 12
AS_IT_IS = Precision("cpu", torch.float32)  # no autocast: the models of this file are of float64


def tiny_model(**overrides):
    torch.manual_seed(5)
    model = create_model(
        "TIMEMAMBA_VITT16",
        img_size=32,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_frames=2,
        project_embed_dim=16,
        context_length=8,
        vocab_size=64,
        text_width=32,
        text_heads=2,
        text_layers=1,
        **overrides,
    )
    with torch.no_grad():  # gates that are zero would hide the time mixers from the test
        for block in model.visual.blocks:
            block.alpha_timeattn.fill_(0.7)
    return model.train().double()


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(CLIPS, 3, 2, 32, 32, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 63, (CLIPS, 8), generator=generator)
    tokens[:, -1] = 63
    return {"video": video[rows], "tokens": tokens[rows], "error": [""] * CLIPS}


def run_step(model, micro_batches, loss, precision=AS_IT_IS):
    figures = contrastive_step(model, micro_batches, lambda v, t, s, _: loss(v, t, s), precision, scale=lambda x: x)
    bare = getattr(model, "module", model)
    return float(figures["loss"]), {n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None}


def micro(first, count, pieces, seed):
    size = count // pieces
    return [batch(slice(first + i * size, first + (i + 1) * size), seed) for i in range(pieces)]


def assert_same(actual, expected, tolerance=1e-9):
    assert actual[0] == pytest.approx(expected[0], rel=1e-12)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        difference = (actual[1][name] - grad).norm() / grad.norm().clamp_min(1e-8)
        assert difference < tolerance, f"gradient of {name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("pieces", [2, 3, 6])
@pytest.mark.parametrize("freeze", [False, True])
def test_micro_batches_give_the_gradients_of_the_whole_batch(pieces, freeze):
    seed = int(torch.randint(10**6, ()))
    whole = run_step(tiny_model(freeze_temperature=freeze), micro(0, CLIPS, 1, seed), ClipLoss())
    cut = run_step(tiny_model(freeze_temperature=freeze), micro(0, CLIPS, pieces, seed), ClipLoss())
    assert ("logit_scale" in whole[1]) is not freeze
    assert_same(cut, whole)


def test_repeated_forward_pass_draws_the_same_dropout():
    """The gradient of cached features only fits a second pass with the same dropped paths and patches."""
    seed = int(torch.randint(10**6, ()))
    dropping = {"drop_path_rate": 0.5, "patch_dropout": 0.5}

    def accumulate_by_hand(model, pieces):
        """Both passes at once: a graph of all micro-batches, drawn in the same order."""
        parts = [model(b["video"], b["tokens"]) for b in pieces]
        loss = ClipLoss()(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), parts[0][2])["loss"]
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    pieces = micro(0, CLIPS, 3, seed)
    model = tiny_model(**dropping)
    torch.manual_seed(seed)
    expected = accumulate_by_hand(model, pieces)
    model = tiny_model(**dropping)
    torch.manual_seed(seed)
    assert_same(run_step(model, pieces, ClipLoss()), expected)


LOSSES = {"full": (False, True), "local": (True, True), "without gathered gradients": (False, False)}


def _distributed_steps(rank, size, pieces, seed):
    dist.init_process_group("gloo")
    share = CLIPS // size
    micro_batches = micro(rank * share, share, pieces, seed)
    losses = {name: ClipLoss(*how, rank=rank, world_size=size) for name, how in LOSSES.items()}
    return {name: run_step(DistributedDataParallel(tiny_model()), micro_batches, loss) for name, loss in losses.items()}


@pytest.mark.parametrize("size, pieces", [(2, 1), (3, 1), (2, 3)])
def test_processes_give_the_loss_and_gradients_of_one(size, pieces, tmp_path):
    seed = int(torch.randint(10**6, ()))
    whole = run_step(tiny_model(), micro(0, CLIPS, 1, seed), ClipLoss())
    parts = run_processes(_distributed_steps, size, tmp_path, pieces, seed)
    for name in LOSSES:
        mean_loss = sum(part[name][0] for part in parts) / size
        for part in parts:  # DDP leaves the same gradients everywhere
            assert_same((mean_loss, part[name][1]), whole)


def test_autocast_runs_the_model_in_bf16_and_the_loss_in_fp32():
    seen = []

    def loss(video, text, scale, _):
        seen.append(video.dtype)
        return ClipLoss()(video, text, scale)

    model = tiny_model().float()
    (clips,) = micro(0, CLIPS, 1, 0)
    clips["video"] = clips["video"].float()
    hook = model.visual.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    figures = contrastive_step(model, [clips], loss, Precision("cpu", torch.bfloat16), scale=lambda x: x)
    hook.remove()
    assert seen[0] is torch.bfloat16 and figures["loss"].dtype is torch.float32
