"""Scratch memory that the next call uses again."""

import contextlib
import math
from collections.abc import Generator

import torch
from torch import Tensor


class Buffers:
    """Flat buffers by name. A buffer is made when it is first asked for, and made again where it is too small."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._flat: dict[str, Tensor] = {}
        self._dtype, self._device = dtype, device

    def view(self, name: str, *shape: int) -> Tensor:
        """Return a view of this shape, not initialised. Views of one name share memory."""
        elements = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < elements:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                self._flat[name] = torch.empty(elements, dtype=self._dtype, device=self._device)
        return self._flat[name][:elements].view(shape)

    def nbytes(self) -> int:
        """Return the size of all buffers in bytes."""
        return sum(flat.nbytes for flat in self._flat.values())


_spare: list[Buffers] = []
_MAX_SPARE, _MAX_SPARE_BYTES = 2, 1 << 28  # more than this is not kept


@contextlib.contextmanager
def borrowed_buffers(dtype: torch.dtype, device: torch.device) -> Generator[Buffers, None, None]:
    """Lend buffers to a call; on a CPU, where there are any, those of an earlier call.

    Memory that comes fresh from the system costs a page fault per 1,024 numbers, which takes longer than what a scan
    does with the numbers. Calls that run at the same time have different buffers.
    """
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
    """Free the buffers of earlier calls; the next call makes new ones."""
    _spare.clear()
