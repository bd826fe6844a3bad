"""The state of a sharded optimizer: in whole to a file, and back to where each process wants its share."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.optim import ZeroRedundancyOptimizer

from avion.optim import build_optimizer, load_optimizer_state, param_groups
from tests.processes import run_processes

KINDS = {"fused": {"fused": True}, "capturable": {"capturable": True}, "plain": {}}


class Small(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, device=device) for _ in range(4))


def stepped(use_zero, steps=3, seed=0, name="adamw"):
    """A model after some steps with gradients that follow from `seed`, and its optimizer."""
    torch.manual_seed(seed)
    model = Small()
    optimizer = build_optimizer(model, name, lr=0.1, weight_decay=0.2, use_zero=use_zero)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def _devices(rank, size):
    """By kind of AdamW, the devices of the loaded state's tensors by name, for parameters on a (pretended) GPU."""
    torch.distributed.init_process_group("gloo")
    _, optimizer = stepped(use_zero=True)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(saved)
    found = {}
    for kind, options in KINDS.items():
        content = copy.deepcopy(saved[0])
        for group in content["param_groups"]:
            group.update({"fused": None, "capturable": False, **options})
        before = {k: dict(v) for k, v in content["state"].items()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            groups = param_groups(Small("cuda"), 0.2)
            optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, lr=0.1, **options)
            load_optimizer_state(optimizer, content)
            states = list(optimizer.optim.state.values())
        assert len(states) == sum(len(group["params"]) for group in optimizer.optim.param_groups) == 8 // size
        assert not optimizer.state
        assert {k: dict(v) for k, v in content["state"].items()} == before
        assert all(v.device.type == "cpu" for state in content["state"].values() for v in state.values())
        found[kind] = {name: {str(s[name].device) for s in states} for name in ("step", "exp_avg", "exp_avg_sq")}
        found[kind]["dtype"] = {str(s["step"].dtype) for s in states}
    return found


def test_every_tensor_is_where_the_optimizer_wants_it(tmp_path):
    """AdamW's `step` is on the GPU where the kernel reads it there, on the CPU where Python reads it."""
    for found in run_processes(_devices, 2, tmp_path):
        for kind, devices in found.items():
            assert devices["exp_avg"] == devices["exp_avg_sq"] == {"cuda:0"}
            assert devices["step"] == ({"cpu"} if kind == "plain" else {"cuda:0"}), kind
            assert devices["dtype"] == {"torch.float32"}


def _resumed(rank, size, saved, name):
    """Two more steps from a saved state: the parameters, and the whole state."""
    torch.distributed.init_process_group("gloo")
    model, optimizer = stepped(use_zero=True, steps=0, seed=7, name=name)
    model.load_state_dict(saved["model"])
    load_optimizer_state(optimizer, saved["optimizer"])
    torch.manual_seed(99)
    for _ in range(2):
        step(model, optimizer)
    optimizer.consolidate_state_dict(to=0)
    return model.state_dict(), optimizer.state_dict() if rank == 0 else None


def _saved(rank, size, name):
    torch.distributed.init_process_group("gloo")
    model, optimizer = stepped(use_zero=True, name=name)
    optimizer.consolidate_state_dict(to=0)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()} if rank == 0 else None


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 2), (2, 3)])
def test_a_state_goes_on_with_any_number_of_processes(before, after, name, tmp_path):
    """Against the plain optimizer without interruption. One process shards nothing."""
    model, optimizer = stepped(use_zero=False, name=name)
    if before == 1:
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    else:
        saved = run_processes(_saved, before, tmp_path / "before", name)[0]
    torch.manual_seed(99)
    for _ in range(2):
        step(model, optimizer)
    wanted = model.state_dict(), optimizer.state_dict()["state"]

    if after == 1:
        resumed, single = stepped(use_zero=False, steps=0, seed=7, name=name)
        resumed.load_state_dict(saved["model"])
        load_optimizer_state(single, saved["optimizer"])
        torch.manual_seed(99)
        for _ in range(2):
            step(resumed, single)
        models, state = [resumed.state_dict()], single.state_dict()["state"]
    else:
        results = run_processes(_resumed, after, tmp_path / "after", saved, name)
        models, state = [m for m, _ in results], results[0][1]["state"]
    for found in models:
        assert all(torch.equal(found[key], value) for key, value in wanted[0].items())
    assert state.keys() == wanted[1].keys()
    for index, tensors in wanted[1].items():
        assert all(torch.equal(state[index][key], value) for key, value in tensors.items())


@pytest.mark.parametrize("change", ["a parameter more", "another shape", "no state", "a text for a state"])
def test_the_state_of_another_model_is_refused(change):
    _, optimizer = stepped(use_zero=False)
    saved = copy.deepcopy(optimizer.state_dict())
    if change == "a parameter more":
        saved["param_groups"][0]["params"].append(99)
    elif change == "another shape":
        saved["state"][0]["exp_avg"] = torch.zeros(3, 4)
    elif change == "no state":
        del saved["state"]
    else:
        saved["state"][0] = "momentum"
    _, fresh = stepped(use_zero=False, steps=0)
    with pytest.raises((ValueError, KeyError, TypeError, IndexError, AttributeError)):
        load_optimizer_state(fresh, saved)
