import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

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
    """The loss, and its gradients with respect to images and texts, in float64."""
    images, texts = images.double(), texts.double()
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
    return total, slope.T @ texts, slope @ images


@pytest.mark.parametrize("weighted", [False, True])
def test_max_margin_loss_over_all_off_diagonal_pairs(weighted):
    images, texts = (x.requires_grad_() for x in features(5))
    weight = torch.rand(5) if weighted else None
    result = MaxMarginRankingLoss(margin=0.3)(images, texts, weight)
    result["loss"].backward()
    loss, image_grad, text_grad = max_margin_by_hand(images.detach(), texts.detach(), 0.3, weight)
    assert float(result["loss"].detach()) == float(result["max_margin_loss"]) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(images.grad.double(), image_grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(texts.grad.double(), text_grad, rtol=1e-4, atol=1e-6)


def test_weights_by_hand():
    """Two pairs at right angles: each text is as near to the other's clip (0.6) as to its own (0.8) but for 0.2."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    loss = MaxMarginRankingLoss(margin=0.5)
    # Every one of the four terms is 0.5 - 0.8 + 0.6 = 0.3.
    assert float(loss(images, texts)["loss"]) == pytest.approx(0.3)
    assert float(loss(images, texts, torch.tensor([1.0, 0.5]))["loss"]) == pytest.approx(0.3 * 0.75)
    assert float(loss(images, texts, torch.tensor([0.0, 0.0]))["loss"]) == 0.0


def test_a_pair_of_weight_zero_pushes_nothing_of_its_own():
    images, texts = features(4)
    grads = {}
    for name, weight in {"none": None, "ones": torch.ones(4), "half": torch.tensor([1.0, 1.0, 1.0, 0.0])}.items():
        v = images.clone().requires_grad_()
        MaxMarginRankingLoss(margin=3.0)(v, texts, weight)["loss"].backward()  # a margin that no pair meets
        grads[name] = v.grad
    torch.testing.assert_close(grads["ones"], grads["none"])
    assert not torch.allclose(grads["half"], grads["none"], atol=1e-3)
    # Of clip 3 remains what the other three pairs want: their texts pushed away from it.
    torch.testing.assert_close(grads["half"][3], (1 / 24) * texts[:3].sum(0))


def test_one_pair_alone_has_nothing_to_be_told_from():
    images, texts = (x.requires_grad_() for x in features(1))
    loss = MaxMarginRankingLoss()(images, texts)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0 and not images.grad.any() and not texts.grad.any()


LOSSES = {
    "clip": ClipLoss(),
    "clip, local": ClipLoss(local_loss=True),
    "clip, gathered without gradient": ClipLoss(gather_with_grad=False),
    "clip, local, gathered without gradient": ClipLoss(local_loss=True, gather_with_grad=False),
    "max-margin": MaxMarginRankingLoss(),
    "max-margin, weighted": MaxMarginRankingLoss(),
    "max-margin, weighted, local": MaxMarginRankingLoss(local_loss=True),
    "max-margin, weighted, gathered without gradient": MaxMarginRankingLoss(gather_with_grad=False),
    "max-margin, local, gathered without gradient": MaxMarginRankingLoss(local_loss=True, gather_with_grad=False),
}


def run_loss(name, images, texts, weight):
    """Loss, and gradients of images, texts and temperature."""
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    third = scale if name.startswith("clip") else weight if "weighted" in name else None
    loss = LOSSES[name](images, texts, third)["loss"]
    loss.backward()
    return loss.detach(), images.grad, texts.grad, torch.zeros(()) if scale.grad is None else scale.grad


def _sharded(rank, size, seed):
    """The losses of one process's rows, with gradients as DDP would average them."""
    dist.init_process_group("gloo")
    (images, texts), weight = features(6, seed), torch.arange(1.0, 7.0)
    rows = slice(rank * 6 // size, (rank + 1) * 6 // size)
    results = {}
    for name in LOSSES:
        loss, *grads = run_loss(name, images[rows], texts[rows], weight[rows])
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
        for i in rows:
            for j in set(range(6)) - {i}:
                clip, text = (v[j], t[j]) if j in rows else (images[j], texts[j])
                for other in (t[i] @ clip, v[i] @ text):
                    (F.relu(0.2 - v[i] @ t[i] + other) / (2 * 3 * 5)).backward()
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
