import math

import numpy as np
import pytest
import torch
from torch import nn

from avion.errors import UserError
from avion.optim import build_optimizer, constant_scheduler, cosine_scheduler, param_groups


def test_cosine_schedule_by_hand():
    values = cosine_scheduler(1.0, 0.2, epochs=3, niter_per_ep=2, warmup_epochs=1, start_warmup_value=0.1)
    by_hand = [0.1, 1.0] + [0.2 + 0.4 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    np.testing.assert_allclose(values, by_hand)


def test_cosine_schedule_without_warmup_starts_at_the_top_and_ends_above_the_bottom():
    values = cosine_scheduler(3e-5, 1e-5, epochs=2, niter_per_ep=5)
    assert values[0] == pytest.approx(3e-5) and len(values) == 10 and np.all(np.diff(values) < 0) and values[-1] > 1e-5


def test_constant_schedule():
    np.testing.assert_array_equal(constant_scheduler(3e-5, 2, 3), [3e-5] * 6)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.A_log = nn.Parameter(torch.randn(2, 4))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)

    def no_weight_decay(self):
        return {"A_log"}


def test_biases_norms_and_the_state_matrix_do_not_decay():
    model = Small()
    decay, no_decay = param_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and [p is model.linear.weight for p in decay["params"]] == [True]
    assert no_decay["weight_decay"] == 0.0
    expected = {id(model.linear.bias), id(model.norm.weight), id(model.norm.bias), id(model.A_log)}
    assert {id(p) for p in no_decay["params"]} == expected


@pytest.mark.parametrize("name, cls", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizer_by_name(name, cls):
    optimizer = build_optimizer(Small(), name, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    assert type(optimizer) is cls and optimizer.param_groups[0]["weight_decay"] == 0.2
    if name == "adamw":
        assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6
    else:
        assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.8]


@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.9])
def test_sgds_momentum_is_the_first_beta_by_hand(momentum):
    """v ← momentum v + (g + wd w); w ← w - lr v, in float64 beside it."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(model, "sgd", lr=0.1, weight_decay=0.2, betas=(momentum, 0.5))
    weight, velocity = model.weight.detach().double(), 0.0
    for _ in range(4):
        gradient = torch.randn(2, 3)
        model.weight.grad = gradient.clone()
        optimizer.step()
        velocity = momentum * velocity + gradient.double() + 0.2 * weight
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_unknown_optimizer_lists_the_known():
    with pytest.raises(UserError, match="adamw, sgd"):
        build_optimizer(Small(), "lion", lr=0.1, weight_decay=0.0)
