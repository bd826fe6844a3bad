"""Towers of which only the last blocks are trained: what is frozen, and that nothing is computed for it."""

import copy
import re

import pytest
import torch
from torch import nn

from avion.errors import UserError
from avion.models.clip import CLIP, VideoClassifier
from avion.models.config import ModelConfig
from avion.models.locking import lock_towers, parameter_counts, train_mode
from avion.models.registry import create_model, register_model
from avion.models.tower import Stack, Tower, register_tower, tower_of
from avion.models.transformer import TextTransformer
from avion.optim import build_optimizer
from tests.models.tiny import DISTINCT_MODELS, TINY, tiny_inputs, tiny_model

DEPTH = 3
# The parameters behind the blocks, by the names of checkpoints.
VIDEO_NORM = r"visual\.(norm|ln_post)\."
VIDEO_PROJECTION = r"(visual\.)?image_projection$"
TEXT_NORM, TEXT_PROJECTION = r"(textual\.)?ln_final\.", r"(textual\.)?text_projection$"
VIDEO_BLOCK = r"visual\.(blocks|transformer\.resblocks)\.{}\."
TEXT_BLOCK = r"(textual\.)?transformer\.resblocks\.{}\."


def deep(name, **overrides):
    return tiny_model(name, depth=DEPTH, text_layers=DEPTH, **overrides)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def matching(model, *patterns):
    return {name for name, _ in model.named_parameters() if any(re.match(p, name) for p in patterns)}


def of_video(model):
    return matching(model, r"visual\.", VIDEO_PROJECTION)


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_what_is_trained_in_every_tower(name):
    model = deep(name)
    text = trained(model) - of_video(model) - {"logit_scale"}
    lock_towers(model, video=1)
    last = matching(model, VIDEO_BLOCK.format(2), VIDEO_NORM, VIDEO_PROJECTION)
    assert trained(model) == last | text | {"logit_scale"} and len(last) > 10

    model = deep(name)
    lock_towers(model, video=0, text=2)
    last = matching(model, TEXT_BLOCK.format("[12]"), TEXT_NORM, TEXT_PROJECTION)
    assert trained(model) == matching(model, VIDEO_PROJECTION) | last | {"logit_scale"} and len(last) == 27

    model = deep(name)
    lock_towers(model, video=DEPTH, text=0)  # all blocks, but no embeddings
    blocks = matching(model, VIDEO_BLOCK.format(r"\d"), VIDEO_NORM, VIDEO_PROJECTION)
    assert trained(model) == blocks | matching(model, TEXT_PROJECTION) | {"logit_scale"}


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_a_tower_tells_each_of_its_parameters_once(name):
    model = deep(name)
    tower = tower_of(model.visual)
    for stack, projection in ((tower.video_stack(model.visual), "image"), (tower.text_stack(model), "text")):
        parts = [*stack.before, *stack.blocks, *stack.behind]
        told = [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
        names = {id(p): n for n, p in model.named_parameters()}
        is_video = projection == "image"
        wanted = of_video(model) if is_video else trained(model) - of_video(model) - {"logit_scale"}
        assert len(told) == len({id(p) for p in told})
        assert {names[id(p)] for p in told} == {n for n in wanted if not n.endswith(f"{projection}_projection")}


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_gates_and_norms_are_kept_free(name):
    model = deep(name, **({"gated_time": True} if name.startswith("LAVILA") else {}))
    gates = matching(model, r".*alpha_timeattn$")
    norms = matching(model, r".*\.(norm\d?|ln_\w+)\.(weight|bias)$", r"ln_final\.")
    rest = matching(model, VIDEO_PROJECTION, TEXT_PROJECTION) | {"logit_scale"}
    lock_towers(model, 0, 0, ["norms"])
    assert trained(model) == norms | rest and len(norms) > 2 * 4 * DEPTH
    other = deep(name, **({"gated_time": True} if name.startswith("LAVILA") else {}))
    if gates:
        assert len(gates) == DEPTH
        lock_towers(other, 0, 0, ["norms", "gates"])
        assert trained(other) == norms | gates | rest
    else:
        with pytest.raises(UserError, match="--lock-except gates: what is locked has no gates; leave gates out"):
            lock_towers(other, 0, 0, ["norms", "gates"])
        assert trained(other) == trained(deep(name))  # nothing is locked where something is wrong
    with pytest.raises(UserError, match="has no gates"):  # the text tower has none
        lock_towers(deep(name), None, 0, ["gates"])


def loss_of(model, inputs):
    video, text, scale = model(*inputs)
    target = torch.arange(len(video))
    logits = scale * video @ text.t()
    return nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.t(), target)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_what_is_trained_gets_the_gradients_of_the_whole_model(name, checkpointed):
    whole = deep(name, grad_checkpointing=checkpointed)
    locked, inputs = copy.deepcopy(whole), tiny_inputs(clips=3)
    lock_towers(locked, 1, 2)
    loss_of(whole, inputs).backward()
    loss_of(locked, inputs).backward()
    wanted = {n: p.grad for n, p in whole.named_parameters()}
    for n, p in locked.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[n], rtol=0, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")
        else:
            assert p.grad is None, n


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_nothing_below_the_first_trained_block_is_kept_or_computed_again(name, checkpointed):
    model = deep(name, grad_checkpointing=checkpointed, drop_path_rate=0.3, patch_dropout=0.25)
    lock_towers(model, 1, 1)
    tower = tower_of(model.visual)
    kept, ran, saved_below = [], [], []

    def pack(x):
        kept.append(x)
        return x

    def entered(block, args, index, which):
        ran.append((which, index))
        if index == DEPTH - 1:
            own = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}  # kept by gradient checkpointing
            saved_below.append([x for x in kept if x.data_ptr() not in own])
            assert not any(x.requires_grad for x in args if isinstance(x, torch.Tensor))

    stacks = {"video": tower.video_stack(model.visual), "text": tower.text_stack(model)}
    for which, stack in stacks.items():
        for i, block in enumerate(stack.blocks):
            block.register_forward_pre_hook(lambda b, args, i=i, w=which: entered(b, args, i, w))
    train_mode(model, model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        video, tokens = tiny_inputs()
        video = model.encode_image(video)
        assert len(kept) > 0
        kept.clear()
        text = model.encode_text(tokens)
    assert len(kept) > 0 and saved_below == [[], []]
    (video.sum() + text.sum()).backward()
    below = [(which, i) for which in ("video", "text") for i in range(DEPTH - 1)]
    assert [ran.count(block) for block in below] == [1] * len(below)
    if checkpointed:
        assert ran.count(("video", DEPTH - 1)) == 2  # only what is trained is computed again


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_frozen_blocks_run_without_drop_path(name):
    model = deep(name, drop_path_rate=0.5)
    lock_towers(model, video=1)
    video = tiny_inputs(clips=8)[0]
    blocks = tower_of(model.visual).video_stack(model.visual).blocks
    seen = []
    blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model.eval()
    model.encode_image(video)
    train_mode(model, model)
    assert model.training and blocks[-1].training and not any(b.training for b in blocks[:-1])
    first, second = model.encode_image(video), model.encode_image(video)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.equal(first, second)  # the trained block drops paths
    model = deep(name, drop_path_rate=0.5)
    lock_towers(model, video=0, except_for=["norms"])  # a block of which something is trained is a trained block
    train_mode(model, model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parameters_take_no_state_and_no_decay(optimizer):
    model = deep("TIMEMAMBA_VITT16")
    lock_towers(model, 1, 0, ["gates"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    built = build_optimizer(model, optimizer, lr=0.1, weight_decay=0.5)
    loss_of(model, tiny_inputs(clips=3)).backward()
    built.step()
    free = trained(model)
    assert sum(len(g["params"]) for g in built.param_groups) == len(free) == len(built.state)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n not in free), n


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_same(backend):
    whole, inputs = deep("TIMEMAMBA_VITT16"), tiny_inputs(clips=3)
    lock_towers(whole, 1, 1)
    compiled = copy.deepcopy(whole)
    wrapped = torch.compile(compiled, backend=backend)
    train_mode(compiled, wrapped)
    train_mode(whole, whole)
    loss_of(whole, inputs).backward()
    loss_of(wrapped, inputs).backward()
    for (n, p), q in zip(whole.named_parameters(), compiled.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_the_head_of_a_classifier_is_always_trained():
    towers = deep("LAVILA_TSF_B16")
    model = VideoClassifier(towers.visual, 0.0, 5, config=towers.config)
    lock_towers(model, video=0)
    assert trained(model) == {"fc_cls.weight", "fc_cls.bias"}


def test_a_number_that_no_tower_has():
    model = deep("TIMEMAMBA_VITT16")
    with pytest.raises(UserError, match="--lock-video 4: the video tower has 3 blocks; give a number from 0 to that"):
        lock_towers(model, video=DEPTH + 1)
    with pytest.raises(UserError, match="--lock-text 4: the text tower has 3 blocks"):
        lock_towers(model, 0, DEPTH + 1)
    assert trained(model) == {n for n, _ in model.named_parameters()}


def test_the_counts():
    model = create_model("LAVILA_TSF_B16", **TINY)
    total = sum(p.numel() for p in model.parameters())
    text = [model.token_embedding, model.transformer, model.ln_final]
    in_text = sum(p.numel() for m in text for p in m.parameters()) + 16 * 32 + 32 * 16
    in_video = total - 1 - in_text
    last = sum(p.numel() for p in model.visual.blocks[1].parameters()) + 2 * 32 + 32 * 16
    lock_towers(model, video=1)
    assert parameter_counts(model) == (
        f"parameters: {total:,} ({in_text + last + 1:,} trained, {in_video - last:,} frozen); "
        f"video tower {in_video:,} ({last:,} trained, {in_video - last:,} frozen), "
        f"text tower {in_text:,} ({in_text:,} trained, 0 frozen), logit scale 1 (1 trained, 0 frozen)"
    )


class SumTower(nn.Module):
    """A tower of one's own: residual layers on the mean pixel."""

    def __init__(self, config):
        super().__init__()
        self.width = config.embed_dim
        self.stem = nn.Linear(config.in_chans, config.embed_dim)
        self.layers = nn.ModuleList(nn.Linear(config.embed_dim, config.embed_dim) for _ in range(config.depth))
        self.last = nn.GroupNorm(1, config.embed_dim)
        self.image_projection = nn.Parameter(torch.randn(config.embed_dim, config.project_embed_dim))

    def features(self, video):
        x = self.stem(video.mean((2, 3, 4)))
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.last(x)

    def forward(self, video):
        return self.features(video) @ self.image_projection


def register_sum(**facts):
    build = lambda config: CLIP(SumTower(config), TextTransformer(config), config)  # noqa: E731
    register_tower(Tower(name="sum", module=SumTower, build=build, **facts))
    register_model(ModelConfig("SUM", "sum"))
    return create_model("SUM", **{**TINY, "depth": DEPTH})


def test_a_tower_of_ones_own_is_locked_by_what_it_tells(clean_registry):
    stack = lambda tower: Stack([tower.stem], list(tower.layers), [tower.last])  # noqa: E731
    model = register_sum(video_stack=stack)
    lock_towers(model, video=1, text=0, except_for=["norms"])
    free = ("image_projection", "layers.2.weight", "layers.2.bias", "last.weight", "last.bias")
    assert {n for n in trained(model) if n.startswith("visual.")} == {f"visual.{name}" for name in free}
    assert "textual.text_projection" in trained(model) and "textual.token_embedding.weight" not in trained(model)
    loss_of(model, tiny_inputs()).backward()
    assert model.visual.layers[1].weight.grad is None and model.visual.layers[2].weight.grad.abs().max() > 0


def test_a_tower_that_does_not_tell_its_blocks_is_not_locked_in_silence(clean_registry):
    model = register_sum()
    with pytest.raises(UserError, match="--lock-video 1: tower SumTower does not tell its blocks; give video_stack="):
        lock_towers(model, video=1)
    model.textual = nn.Linear(1, 1)
    with pytest.raises(UserError, match="--lock-text 1: .*give text_stack= to its Tower"):
        lock_towers(model, text=1)
