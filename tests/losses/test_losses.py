import inspect
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from avion.errors import UserError
from avion.losses import ClipLoss, MaxMarginRankingLoss
from tests.processes import run_processes

E = 5


def features(n, seed=None):
    g = torch.Generator().manual_seed(seed) if seed is not None else None
    return F.normalize(torch.randn(n, E, generator=g), dim=-1), F.normalize(torch.randn(n, E, generator=g), dim=-1)


def clip_loss_by_hand(images, texts, scale):
    n, total, hits = len(images), 0.0, 0
    logits = [[scale * sum(float(a) * float(b) for a, b in zip(v, t, strict=True)) for t in texts] for v in images]
    for i in range(n):
        row, column = logits[i], [logits[j][i] for j in range(n)]
        total += math.log(sum(math.exp(x) for x in row)) - row[i]
        total += math.log(sum(math.exp(x) for x in column)) - column[i]
        hits += max(range(n), key=row.__getitem__) == i
    return total / (2 * n), 100.0 * hits / n


def test_clip_loss_is_the_mean_of_two_cross_entropies():
    images, texts = features(6)
    result = ClipLoss()(images, texts, torch.tensor(7.0))
    loss, accuracy = clip_loss_by_hand(images, texts, 7.0)
    assert float(result["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(result["clip_acc"]) == pytest.approx(accuracy)


def max_margin_by_hand(images, texts, margin, weight=None):
    """The loss, and its gradients with respect to images and texts (n, E) of any length, in float64."""
    lengths = [x.double().norm(dim=1, keepdim=True) for x in (images, texts)]
    images, texts = (x.double() / length for x, length in zip((images, texts), lengths, strict=True))
    n, total, s = len(images), 0.0, texts @ images.T
    slope = torch.zeros_like(s)  # dL/dS
    for i in range(n):
        for j in range(n):
            w = (1.0 if weight is None else float(weight[i])) / (2 * n * (n - 1))
            for other in [(i, j), (j, i)] if i != j else []:
                hinge = margin - float(s[i, i]) + float(s[other])
                if hinge > 0:
                    total += w * hinge
                    slope[i, i] -= w
                    slope[other] += w
    # Of a gradient with respect to x / |x| what is at right angles to x is left, over |x|.
    gradients = zip((images, texts), (slope.T @ texts, slope @ images), lengths, strict=True)
    return total, *((g - (g * unit).sum(1, keepdim=True) * unit) / length for unit, g, length in gradients)


@pytest.mark.parametrize("lengths", ["unit", "any"])
@pytest.mark.parametrize("weighted", [False, True])
def test_max_margin_loss_over_all_off_diagonal_pairs(weighted, lengths):
    images, texts = features(5)
    if lengths == "any":
        images, texts = images * (0.1 + 5 * torch.rand(5, 1)), texts * (0.1 + 5 * torch.rand(5, 1))
    images, texts = images.requires_grad_(), texts.requires_grad_()
    weight = torch.rand(5) if weighted else None
    result = MaxMarginRankingLoss(margin=0.3, weighted=weighted)(images, texts, weight)
    assert result.keys() == {"loss", "max_margin_loss"}
    result["loss"].backward()
    loss, image_grad, text_grad = max_margin_by_hand(images.detach(), texts.detach(), 0.3, weight)
    assert float(result["loss"].detach()) == float(result["max_margin_loss"]) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(images.grad.double(), image_grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(texts.grad.double(), text_grad, rtol=1e-4, atol=1e-6)


def test_weights_by_hand():
    """Two pairs at right angles: each text is as near to the other's clip (0.6) as to its own (0.8) but for 0.2."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    loss = MaxMarginRankingLoss(margin=0.5, weighted=True)
    # Every one of the four terms is 0.5 - 0.8 + 0.6 = 0.3.
    assert float(loss(images, texts)["loss"]) == pytest.approx(0.3)
    assert float(loss(images, texts, torch.tensor([1.0, 0.5]))["loss"]) == pytest.approx(0.3 * 0.75)
    assert float(loss(images, texts, torch.tensor([0.0, 0.0]))["loss"]) == 0.0


def test_with_the_diagonal_by_hand():
    """Two more terms of the margin for each pair, and eight terms in the place of four."""
    images = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    texts = torch.tensor([[0.8, 0.6], [6.0, 8.0]])
    found = MaxMarginRankingLoss(margin=0.5, fix_norm=False)(images, texts)["loss"]
    assert float(found) == pytest.approx((4 * 0.3 + 4 * 0.5) / 8)
    weight = torch.tensor([1.0, 0.5])
    found = MaxMarginRankingLoss(0.5, False, weighted=True)(images, texts, weight)["loss"]
    assert float(found) == pytest.approx(0.75 * (4 * 0.3 + 4 * 0.5) / 8)


def test_weights_are_not_used_unasked_and_that_is_said_once(caplog):
    images, texts = features(4)
    loss = MaxMarginRankingLoss()
    found = [float(loss(images, texts, weight=torch.rand(4, dtype=torch.float64))["loss"]) for _ in range(2)]
    assert found == [float(loss(images, texts)["loss"])] * 2
    assert [record.message for record in caplog.records] == [
        "MaxMarginRankingLoss: the weights are not used, as in AVION; weighted=True uses them"
    ]


@pytest.mark.parametrize("loss", [ClipLoss(), MaxMarginRankingLoss()])
def test_features_that_are_no_pairs(loss):
    images, texts = features(4)
    for v, t in ((images, texts[:3]), (images[0], texts[0]), (images, texts[:, :3])):
        with pytest.raises(UserError, match=r"features of one shape \(B, E\) are required, found \("):
            loss(v, t, *([torch.tensor(2.0)] if isinstance(loss, ClipLoss) else []))


@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_another_shape(weighted):
    images, texts = features(4)
    for shape in ((4, 1), (3,), ()):
        with pytest.raises(UserError, match=r"weights of shape \(4,\) are required, found"):
            MaxMarginRankingLoss(weighted=weighted)(images, texts, torch.ones(shape))


def test_features_of_length_zero_have_finite_gradients():
    images, texts = features(3)
    images[1] = 0.0
    images.requires_grad_()
    MaxMarginRankingLoss()(images, texts)["loss"].backward()
    assert images.grad.isfinite().all()


def test_a_pair_of_weight_zero_pushes_nothing_of_its_own():
    images, texts = features(4)
    grads = {}
    for name, weight in {"none": None, "ones": torch.ones(4), "half": torch.tensor([1.0, 1.0, 1.0, 0.0])}.items():
        v = images.clone().requires_grad_()
        MaxMarginRankingLoss(margin=3.0, weighted=True)(v, texts, weight)[
            "loss"
        ].backward()  # a margin that no pair meets
        grads[name] = v.grad
    torch.testing.assert_close(grads["ones"], grads["none"])
    assert not torch.allclose(grads["half"], grads["none"], atol=1e-3)
    # Of clip 3 remains what the other three pairs want: their texts pushed away from it, its length kept.
    pushed, unit = (1 / 24) * texts[:3].sum(0), images[3]
    torch.testing.assert_close(grads["half"][3], pushed - (pushed @ unit) * unit)


def test_one_pair_alone_has_nothing_to_be_told_from():
    images, texts = (x.requires_grad_() for x in features(1))
    loss = MaxMarginRankingLoss()(images, texts)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0 and not images.grad.any() and not texts.grad.any()


LOSSES = {
    "clip": (ClipLoss, {"gather_with_grad": True, "cache_labels": True}),
    "clip, local": (ClipLoss, {"local_loss": True, "gather_with_grad": True}),
    "clip, gathered without gradient": (ClipLoss, {}),
    "clip, local, gathered without gradient": (ClipLoss, {"local_loss": True, "cache_labels": True}),
    "max-margin": (MaxMarginRankingLoss, {"gather_with_grad": True}),
    "max-margin, with its diagonal, local": (
        MaxMarginRankingLoss, {"fix_norm": False, "local_loss": True, "gather_with_grad": True}
    ),
    "max-margin, weighted": (MaxMarginRankingLoss, {"weighted": True, "gather_with_grad": True}),
    "max-margin, weighted, local": (
        MaxMarginRankingLoss, {"weighted": True, "local_loss": True, "gather_with_grad": True}
    ),
    "max-margin, weighted, gathered without gradient": (MaxMarginRankingLoss, {"weighted": True}),
    "max-margin, local, gathered without gradient": (MaxMarginRankingLoss, {"local_loss": True}),
}  # fmt: skip


def run_loss(name, images, texts, weight, rank=0, size=1):
    """Loss, and gradients of images, texts and temperature."""
    cls, arguments = LOSSES[name]
    criterion = cls(rank=rank, world_size=size, **arguments)
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    third = scale if name.startswith("clip") else weight if "weighted" in name else None
    loss = criterion(images, texts, third)["loss"]
    assert loss == criterion(images, texts, third)["loss"]  # with the labels kept, where they are
    loss.backward()
    return loss.detach(), images.grad, texts.grad, torch.zeros(()) if scale.grad is None else scale.grad


def _sharded(rank, size, seed):
    """The losses of one process's rows, with gradients as DDP would average them."""
    dist.init_process_group("gloo")
    (images, texts), weight = features(6, seed), torch.arange(1.0, 7.0)
    rows = slice(rank * 6 // size, (rank + 1) * 6 // size)
    results = {}
    for name in LOSSES:
        loss, *grads = run_loss(name, images[rows], texts[rows], weight[rows], rank, size)
        results[name] = (loss / size, *(g / size for g in grads))
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_give_the_loss_and_gradients_of_one(size, tmp_path):
    seed = int(torch.randint(10**6, ()))
    (images, texts), weight = features(6, seed), torch.arange(1.0, 7.0)
    parts = run_processes(_sharded, size, tmp_path, seed)
    for name in LOSSES:
        if name.endswith("local, gathered without gradient"):
            continue  # stops gradients by design: the test below
        loss, image_grad, text_grad, temperature_grad = run_loss(name, images, texts, weight)
        shares = [p[name] for p in parts]
        close = {"rtol": 1e-4, "atol": 1e-6, "msg": lambda m, name=name: f"{name}: {m}"}
        torch.testing.assert_close(sum(s[0] for s in shares), loss, **close)
        torch.testing.assert_close(torch.cat([s[1] for s in shares]), image_grad, **close)
        torch.testing.assert_close(torch.cat([s[2] for s in shares]), text_grad, **close)
        torch.testing.assert_close(sum(s[3] for s in shares), temperature_grad, **close)


def test_local_loss_without_gathered_gradients_stops_at_the_own_rows(tmp_path):
    """Each process's features learn from its own rows and columns alone."""
    seed = 11
    results = run_processes(_sharded, 2, tmp_path, seed)
    images, texts = features(6, seed)
    for rank, part in enumerate(p["max-margin, local, gathered without gradient"] for p in results):
        rows = range(3 * rank, 3 * rank + 3)
        v, t = images.clone().requires_grad_(), texts.clone().requires_grad_()
        terms = []
        for i in rows:
            for j in set(range(6)) - {i}:
                clip, text = (v[j], t[j]) if j in rows else (images[j], texts[j])
                own = F.cosine_similarity(v[i], t[i], dim=0)
                for other in (F.cosine_similarity(t[i], clip, dim=0), F.cosine_similarity(v[i], text, dim=0)):
                    terms.append(F.relu(0.2 - own + other) / (2 * 3 * 5))
        sum(terms).backward()
        torch.testing.assert_close(part[1], v.grad[3 * rank :][:3] / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part[2], t.grad[3 * rank :][:3] / 2, rtol=1e-4, atol=1e-6)
    for rank, part in enumerate(p["clip, local, gathered without gradient"] for p in results):
        rows = slice(3 * rank, 3 * rank + 3)
        v, t = images[rows].clone().requires_grad_(), texts[rows].clone().requires_grad_()
        all_v = torch.cat([images[: 3 * rank], v, images[3 * rank + 3 :]])
        all_t = torch.cat([texts[: 3 * rank], t, texts[3 * rank + 3 :]])
        labels = torch.arange(3) + 3 * rank
        loss = (F.cross_entropy(5 * v @ all_t.T, labels) + F.cross_entropy(5 * t @ all_v.T, labels)) / 2
        loss.backward()
        torch.testing.assert_close(part[1], v.grad / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part[2], t.grad / 2, rtol=1e-4, atol=1e-6)


# ---- AVION's arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "names", "defaults"),
    [
        (
            ClipLoss, ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"],
            [False, False, False, 0, 1, False],
        ),
        (
            MaxMarginRankingLoss,
            ["margin", "fix_norm", "local_loss", "gather_with_grad", "rank", "world_size", "use_horovod"],
            [0.2, True, False, False, 0, 1, False],
        ),
    ],
)  # fmt: skip
def test_arguments_stand_where_avions_stand(cls, names, defaults):
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == names and [p.default for p in positional] == defaults
    assert [p.name for p in parameters[len(names) :]] == (["weighted"] if cls is MaxMarginRankingLoss else [])
    cls(*defaults)


@pytest.mark.parametrize("cls", [ClipLoss, MaxMarginRankingLoss])
def test_a_place_among_the_processes_that_is_not_there(cls):
    images, texts = features(2)
    third = torch.tensor(1.0) if cls is ClipLoss else None
    with pytest.raises(UserError, match=r"rank=0, world_size=2, but there is no process group; give"):
        cls(rank=0, world_size=2)(images, texts, third)
    for rank, size in ((2, 2), (-1, 1), (0, 0)):
        with pytest.raises(UserError, match=rf"rank={rank} of world_size={size} does not exist"):
            cls(rank=rank, world_size=size)
    with pytest.raises(UserError, match=r"use_horovod=True is not supported"):
        cls(use_horovod=True)


def _alone_and_misplaced(rank, size, seed):
    dist.init_process_group("gloo")
    (images, texts), scale = features(6, seed), torch.tensor(5.0)
    rows = slice(3 * rank, 3 * rank + 3)
    alone = (
        ClipLoss()(images[rows], texts[rows], scale)["loss"],
        MaxMarginRankingLoss()(images[rows], texts[rows])["loss"],
    )
    try:
        ClipLoss(rank=1 - rank, world_size=2)(images[rows], texts[rows], scale)
    except UserError as error:
        return alone, str(error)


def test_one_of_several_processes_can_be_asked_for_its_own_pairs(tmp_path):
    """world_size=1, as in AVION; another rank than the process group's is refused on the spot, on every process."""
    images, texts = features(6, seed=3)
    for rank, (alone, error) in enumerate(run_processes(_alone_and_misplaced, 2, tmp_path, 3)):
        rows = slice(3 * rank, 3 * rank + 3)
        assert float(alone[0]) == pytest.approx(clip_loss_by_hand(images[rows], texts[rows], 5.0)[0], rel=1e-5)
        assert float(alone[1]) == pytest.approx(max_margin_by_hand(images[rows], texts[rows], 0.2)[0], rel=1e-5)
        assert f"rank={1 - rank}, world_size=2, but there is rank {rank} of a process group of 2" in error


def test_labels_kept_in_inference_mode_do_not_end_training():
    images, texts = features(3)
    loss = ClipLoss(cache_labels=True)
    with torch.inference_mode():
        loss(images, texts, torch.tensor(2.0))
    images.requires_grad_()
    loss(images, texts, torch.tensor(2.0))["loss"].backward()
    assert images.grad.abs().sum() > 0
    kept = loss.labels(torch.zeros(3, 3))
    assert loss.labels(torch.zeros(3, 3)) is kept and len(loss.labels(torch.zeros(4, 4))) == 4
    loss = ClipLoss()
    assert loss.labels(torch.zeros(3, 3)) is not loss.labels(torch.zeros(3, 3))
