"""The scan of a group of blocks with plain PyTorch operators: scratch memory, and the walks through it.

The state is computed as a sum, s_t = c_t + b_t: c_t = exp(Δ_t A) s_{t-1} is carried over from the step before, and
b_t = Δ_t u_t B_t is what the step adds. All that b_t contributes to y and to the gradients of B, C and Δu are products
of vectors, B_t·C_t and dy_t·Δu_t. Only c_t needs operators over (steps, rows, N, D), and the first step of a row has no
c_t. `docs/scan.md` has the maths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from avion.ops.buffers import Buffers

from .inputs import Time

_LOG2_E = 1.4426950408889634


class Parameters:
    """The parameters of one direction, in the compute dtype."""

    def __init__(self, A: Tensor, D: Tensor, delta_bias: Tensor | None, dtype: torch.dtype, time: Time):
        self.dtype, self.time = dtype, time
        self.A = A.to(dtype).t().contiguous()  # (N, D)
        self.A_log2 = self.A * _LOG2_E  # exp(ΔA) = exp2(Δ·A_log2), the faster of the two on CPUs
        self.D = D.to(dtype)
        self.bias = None if delta_bias is None else delta_bias.to(dtype)

    @property
    def states(self) -> int:
        """N, the number of states per channel."""
        return self.A.shape[0]


class ParameterGradients:
    """Running sums of the parameters' gradients, in the compute dtype."""

    def __init__(self, p: Parameters):
        self.A = torch.zeros_like(p.A)  # (N, D)
        self.D, self.bias = torch.zeros_like(p.D), torch.zeros_like(p.D)


class _Block(NamedTuple):
    """Views of a group's buffers at one of the group's blocks.

    The keys of the dictionaries say whether a state enters the block.
    """

    step: dict[bool, Tensor]  # Δ (live, rows, 1, D) of the steps into which something is carried
    step_u: Tensor  # (steps, rows, 1, D)
    step_u_at: tuple[Tensor, ...]  # of each step, (rows, 1, D)
    B: Tensor  # (steps, rows, N, 1)
    B_at: tuple[Tensor, ...]  # of each step, (rows, N, 1)
    C_row: dict[bool, Tensor]  # (live · rows, 1, N)
    y_row: dict[bool, Tensor]  # (live · rows, 1, D)


class _BackwardBlock(NamedTuple):
    dy_at: tuple[Tensor, ...]  # of each step, (rows, 1, D)
    C_at: tuple[Tensor, ...]  # of each step, (rows, N, 1)
    dy_row: dict[bool, Tensor]  # (live · rows, 1, D)
    dC_row: dict[bool, Tensor]  # (live · rows, 1, N)
    d_step: dict[bool, Tensor]  # (live, rows, D)
    # Of all steps but the last, whose states other steps read; and of the last step.
    to_later: "_Products"
    to_leaving: "_Products"


class _Products(NamedTuple):
    """Vectors to multiply an adjoint with, and the products: (M, 1, D) and (M, 1, N) with M = steps · rows."""

    step_u: Tensor
    B: Tensor
    d_step_u: Tensor
    dB: Tensor

    def of(self, adjoint: Tensor) -> None:
        """Fill d_step_u and dB from the adjoint (M, N, D)."""
        # The transpose is used because the product of a column is eight times slower on CPUs than that of a row.
        torch.bmm(self.step_u, adjoint.mT, out=self.dB)
        torch.bmm(self.B, adjoint, out=self.d_step_u)


def softplus(x: Tensor, out: Tensor) -> None:
    """Write log(1 + exp(x)) to `out`.

    PyTorch's default threshold, beyond which x itself is returned, is too low for float64.
    """
    torch.ops.aten.softplus.out(x, 1, 40, out=out)


def _as_rows(block: Tensor) -> Tensor:
    """(steps, rows, X) → (M, 1, X): the row vectors of a batched product."""
    return block.flatten(0, 1)[:, None]


def _at(states: Tensor | None, i: int, rows: int) -> Tensor | None:
    """Return the part of a group's states (R', N, D) that belongs to block i."""
    return None if states is None else states[i * rows : (i + 1) * rows]


class Scratch:
    """The buffers for one shape of group, and the walk forward.

    Buffers of the group, (blocks, steps, rows, D): raw (delta + bias), step (Δ), step_u (Δu), y, and u, which the
    caller sets. B and C have N in place of D, and BC, B_t · C_t, has 1. Buffers of a block, (steps, rows, N, D): decay,
    exp(ΔA), and states. `first` and `last` are steps in walking order, `rest` is all steps but the first, and `before`
    is all steps but the last.
    """

    u: Tensor

    def __init__(self, buffers: Buffers, p: Parameters, blocks: int, steps: int, rows: int):
        self.p, self.shape = p, (blocks, steps, rows)
        self._buffers = buffers
        self.raw, self.step, self.step_u = (self._wide(name) for name in ("raw", "step", "step_u"))
        self.y = self.raw  # the forward pass does not read raw once it has computed step
        self.B, self.C, self.spare = (self._narrow(name) for name in ("B", "C", "spare"))
        self.BC = buffers.view("BC", *self.shape, 1)
        self.decay, self.states = (self._block_buffer(name) for name in ("decay", "states"))
        self.decay_at, self.states_at = self.decay.unbind(0), self.states.unbind(0)
        order = range(steps - 1, -1, -1) if p.time.reverse else range(steps)
        self.first, self.last = order[0], order[-1]
        self.rest, self.before = slice(1, steps), slice(0, steps - 1)
        if p.time.reverse:
            self.rest, self.before = self.before, self.rest
        self.live = {True: slice(None), False: self.rest}
        self.live_decay = self._of_live(self.decay)
        self.live_decay_flat = {enters: part.flatten(0, 1) for enters, part in self.live_decay.items()}
        self.pairs = list(zip(order, order[1:], strict=False))  # a step and the one after it
        self.blocks = [self._block(i) for i in range(blocks)]

    def _wide(self, name: str) -> Tensor:
        return self._buffers.view(name, *self.shape, self.p.A.shape[1])

    def _narrow(self, name: str) -> Tensor:
        return self._buffers.view(name, *self.shape, self.p.A.shape[0])

    def _block_buffer(self, name: str) -> Tensor:
        return self._buffers.view(name, *self.shape[1:], *self.p.A.shape)

    def _of_live(self, block: Tensor) -> dict[bool, Tensor]:
        return {enters: block[live] for enters, live in self.live.items()}

    def _block(self, i: int) -> _Block:
        step_u, B = self.step_u[i][:, :, None, :], self.B[i][:, :, :, None]
        return _Block(
            step=self._of_live(self.step[i][:, :, None, :]),
            step_u=step_u,
            step_u_at=step_u.unbind(0),
            B=B,
            B_at=B.unbind(0),
            C_row={enters: _as_rows(part) for enters, part in self._of_live(self.C[i]).items()},
            y_row={enters: _as_rows(part) for enters, part in self._of_live(self.y[i]).items()},
        )

    def derive(self) -> None:
        """Fill step, step_u and BC from raw, u, B and C."""
        if self.p.time.softplus:
            softplus(self.raw, out=self.step)
        else:
            self.step.copy_(self.raw)
        torch.mul(self.step, self.u, out=self.step_u)
        torch.sum(torch.mul(self.B, self.C, out=self.spare), -1, keepdim=True, out=self.BC)

    def forward(self, carry: Tensor | None = None, leaving: Tensor | None = None) -> Tensor:
        """Walk the steps forward, after `derive`.

        Args:
            carry: the state before the first step, (R', N, D); None means zeros.
            leaving: where the state after the last step is written, (R', N, D); it may be `carry`, or None.

        Returns:
            y of the group, (blocks, steps, rows, D): a buffer.
        """
        rows, enters = self.shape[2], carry is not None
        for i, block in enumerate(self.blocks):
            self._decays(block, enters)
            to = _at(leaving, i, rows)
            self._walk(block, _at(carry, i, rows), to is not None)
            torch.bmm(block.C_row[enters], self.live_decay_flat[enters], out=block.y_row[enters])
            if to is not None:
                to.copy_(self.states_at[self.last])
        if not enters:
            self.y[:, self.first].zero_()
        return self.y.addcmul_(self.step_u, self.BC).addcmul_(self.u, self.p.D)

    def _decays(self, block: _Block, enters: bool) -> None:
        torch.mul(block.step[enters], self.p.A_log2, out=self.live_decay[enters]).exp2_()

    def _walk(self, block: _Block, carry: Tensor | None, leaves: bool) -> None:
        """Turn the decays into what is carried over. The last step's `states` are right only if `leaves` is set."""
        part = slice(None) if leaves else self.before
        torch.mul(block.step_u[part], block.B[part], out=self.states[part])
        if carry is not None:
            self._carry_over(self.first, carry, leaves)
        for now, after in self.pairs:
            self._carry_over(after, self.states_at[now], leaves)

    def _carry_over(self, step: int, state: Tensor, leaves: bool) -> None:
        self.decay_at[step].mul_(state)
        if leaves or step != self.last:
            self.states_at[step].add_(self.decay_at[step])


class BackwardScratch(Scratch):
    """The buffers of `Scratch` and those of the backward pass, and the walk back.

    Buffers of the group: dy, d_step and d_step_u (…, D), dB and dC (…, N). The buffer `grad` of a block holds the
    adjoint of the states. `states` holds what is carried over.
    """

    def __init__(self, buffers: Buffers, p: Parameters, blocks: int, steps: int, rows: int):
        super().__init__(buffers, p, blocks, steps, rows)
        self.dy, self.d_step, self.d_step_u = (self._wide(name) for name in ("dy", "d_step", "d_step_u"))
        self.dB, self.dC = self._narrow("dB"), self._narrow("dC")
        self.seen = buffers.view("seen", *self.shape, 1)  # dy_t · Δu_t
        self.grad = self._block_buffer("grad")
        self.grad_at = self.grad.unbind(0)
        self.sum_A = buffers.view("sum_A", p.A.numel())
        self.carried, self.carried_at = self._of_live(self.states), self.states_at
        self.carried_T = {enters: part.flatten(0, 1).mT for enters, part in self.carried.items()}
        self.live_grad = self._of_live(self.grad)
        self.live_grad_rows = {enters: part.flatten(0, 1).flatten(1) for enters, part in self.live_grad.items()}
        self.backward_blocks = [self._backward_block(i) for i in range(blocks)]

    def _backward_block(self, i: int) -> _BackwardBlock:
        return _BackwardBlock(
            dy_at=self.dy[i][:, :, None, :].unbind(0),
            C_at=self.C[i][:, :, :, None].unbind(0),
            dy_row={enters: _as_rows(part) for enters, part in self._of_live(self.dy[i]).items()},
            dC_row={enters: _as_rows(part) for enters, part in self._of_live(self.dC[i]).items()},
            d_step=self._of_live(self.d_step[i]),
            to_later=self._products(i, self.before),
            to_leaving=self._products(i, slice(self.last, self.last + 1)),
        )

    def _products(self, i: int, steps: slice) -> _Products:
        return _Products(*(_as_rows(t[i][steps]) for t in (self.step_u, self.B, self.d_step_u, self.dB)))

    def backward(self, carry: Tensor | None, adjoint: Tensor | None, grads: ParameterGradients) -> None:
        """Walk the steps back, after `derive`, with dy filled.

        Leave the gradient of raw in d_step, the gradient of u in d_step_u, and dB and dC. Overwrite raw and step_u.

        Args:
            carry: the state before the first step, (R', N, D); None means zeros.
            adjoint: the gradient of the states that leave the group, (R', N, D); it is overwritten with the gradient
                of `carry`. None means that no state leaves.
            grads: the parameters' gradients, to which this group's are added.
        """
        rows = self.shape[2]
        torch.sum(torch.mul(self.dy, self.step_u, out=self.d_step), -1, keepdim=True, out=self.seen)
        for i in range(len(self.blocks)):
            self._walk_back(i, _at(carry, i, rows), _at(adjoint, i, rows), grads)
        # Add the contribution of b_t, and clear what no walk has reached.
        if carry is None:
            self.d_step[:, self.first].zero_()
            self.dC[:, self.first].zero_()
        if adjoint is None:
            self.d_step_u[:, self.last].zero_()
            self.dB[:, self.last].zero_()
        self.d_step_u.addcmul_(self.dy, self.BC)
        self.dB.addcmul_(self.C, self.seen)
        self.dC.addcmul_(self.B, self.seen)

        self.d_step.addcmul_(self.d_step_u, self.u)
        if self.p.time.softplus:
            self.d_step.mul_(self.raw.sigmoid_())
        self.d_step_u.mul_(self.step).addcmul_(self.dy, self.p.D)
        grads.bias += self.d_step.sum((0, 1, 2))
        grads.D += torch.mul(self.dy, self.u, out=self.step_u).sum((0, 1, 2))

    def _walk_back(self, i: int, carry: Tensor | None, adjoint: Tensor | None, grads: ParameterGradients) -> None:
        block, own, enters = self.blocks[i], self.backward_blocks[i], carry is not None
        self._decays(block, enters)
        self._recompute(block, carry)
        torch.bmm(own.dy_row[enters], self.carried_T[enters], out=own.dC_row[enters])

        # grad is computed from the last step to the first; decay becomes decay · grad, the share of the step before.
        torch.mul(own.dy_at[self.last], own.C_at[self.last], out=self.grad_at[self.last])
        if adjoint is not None:
            own.to_leaving.of(adjoint)
            self.grad_at[self.last].add_(adjoint)
        for now, after in reversed(self.pairs):
            self.decay_at[after].mul_(self.grad_at[after])
            if enters or now != self.first:
                torch.addcmul(self.decay_at[after], own.dy_at[now], own.C_at[now], out=self.grad_at[now])
        if self.pairs:
            own.to_later.of(self.live_decay_flat[False])
        if enters:
            torch.mul(self.decay_at[self.first], self.grad_at[self.first], out=adjoint)

        # The gradient of the exponent Δ·A.
        exponent = self.carried[enters].mul_(self.live_grad[enters])
        torch.mul(exponent, block.step[enters], out=self.live_grad[enters])
        torch.sum(self.live_grad_rows[enters], 0, out=self.sum_A)
        grads.A.view(-1).add_(self.sum_A)
        torch.sum(exponent.mul_(self.p.A), 2, out=own.d_step[enters])

    def _recompute(self, block: _Block, carry: Tensor | None) -> None:
        """Fill `states` with what is carried over; `grad` serves as memory for the states themselves."""
        if carry is not None:
            torch.mul(self.decay_at[self.first], carry, out=self.carried_at[self.first])
        for now, after in self.pairs:
            state = self.grad_at[now]
            if carry is None and now == self.first:
                torch.mul(block.step_u_at[now], block.B_at[now], out=state)
            else:
                torch.addcmul(self.carried_at[now], block.step_u_at[now], block.B_at[now], out=state)
            torch.mul(self.decay_at[after], state, out=self.carried_at[after])
