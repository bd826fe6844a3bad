"""Scratch memory that is used again by the next call."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Buffers:
    """Flat buffers by name, made when first asked for and made anew where they are too small."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._flat: dict[str, Tensor] = {}
        self._options = {"dtype": dtype, "device": device}

    def view(self, name: str, *shape: int) -> Tensor:
        """(*shape), not initialised. Views of one name share memory."""
        elements = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < elements:
            with torch.inference_mode(False):  # what is made under it could not be written outside of it
                self._flat[name] = torch.empty(elements, **self._options)
        return self._flat[name][:elements].view(shape)

    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())


_spare: list[Buffers] = []
_MAX_SPARE, _MAX_SPARE_BYTES = 2, 1 << 28  # more is not kept


@contextlib.contextmanager
def borrowed_buffers(dtype: torch.dtype, device: torch.device) -> Iterator[Buffers]:
    """On a CPU those of an earlier call: memory fresh from the system costs a page fault per 1,024 numbers, which takes
    longer than what a scan does with them. Calls at the same time have buffers of their own."""
    if device.type != "cpu" or dtype != torch.float32:
        yield Buffers(dtype, device)
        return
    try:
        buffers = _spare.pop()
    except IndexError:
        buffers = Buffers(dtype, device)
    yield buffers
    if buffers.nbytes() <= _MAX_SPARE_BYTES and len(_spare) < _MAX_SPARE:
        _spare.append(buffers)


def forget_spare_buffers() -> None:
    """The next call makes its own."""
    _spare.clear()
