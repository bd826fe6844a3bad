"""Compiles the Triton kernels for an H100, which needs none: the interpreter takes much that the compiler does not.

Prints a line per kernel: its registers, shared memory and spilled bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from avion.ops.causal_conv import triton as conv
from avion.ops.selective_scan import triton_kernels as scan

HALF, FLOAT = "*bf16", "*fp32"
IN_HALF = {"u", "delta", "B", "C", "z", "y", "dy", "du", "d_delta", "dz", "x", "dx", "y_b", "dy_b", "v", "W"}
IN_FLOAT = {
    "A", "D", "bias", "entering", "carried", "scratch", "dB", "dC", "dA", "dD", "d_bias", "total", "weight", "d_weight"
}  # fmt: skip
# As in training at D = 768, N = 16, T = 4; long rows in parts; sizes that fill no block.
SCAN = {"N": 16, "SEGMENT": 32, "HAS_BIAS": True, "SOFTPLUS": True, "REVERSE": True}
SHORT = {"ADD": True, "GATE": True, "ONE_CHUNK": True, "PARTED": False, "EXACT": True}
LONG = {"ADD": False, "GATE": False, "ONE_CHUNK": False, "PARTED": True, "EXACT": False}
CONV = {"K": 4, "SIGN": 1, "COUNT": 2, "BLOCK_T": 4, "BLOCK_D": 128}
KERNELS = [
    (scan.forward_kernel, {**SCAN, **SHORT, "KEEP": False, "BLOCK_D": 128, "CHUNK": 4}, 2),
    (scan.forward_kernel, {**SCAN, **LONG, "KEEP": True, "BLOCK_D": 32, "CHUNK": 4}, 1),
    (scan.backward_kernel, {**SCAN, **SHORT, "KEPT": False, "BLOCK_D": 32, "CHUNK": 4}, 1),
    (scan.backward_kernel, {**SCAN, **LONG, "KEPT": True, "BLOCK_D": 32, "CHUNK": 2}, 1),
    (scan.part_kernel, {**SCAN, "GATE": True, "ADJOINT": True, "EXACT": True, "BLOCK_D": 32, "CHUNK": 4}, 1),
    (scan.join_kernel, {"N": 16, "BLOCK_D": 32, "ADJOINT": False}, 1),
    (conv.forward_kernel, CONV, 4),
    (conv.backward_kernel, CONV, 4),
]


def compile_kernel(kernel, constants: dict, warps: int) -> str:
    """The machine code's resources."""
    unit_strides = {n: 1 for n in kernel.arg_names if re.fullmatch(r"(u|delta|dy|dy_b|z|v|x)_d|[BCW]_n", n)}
    constants = {**{k: v for k, v in constants.items() if k in kernel.arg_names}, **unit_strides}
    signature = {}
    for name in kernel.arg_names:
        pointer = HALF if name in IN_HALF else FLOAT if name in IN_FLOAT else "i32"
        signature[name] = "constexpr" if name in constants else pointer
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:\d+ STACK:\d+ SHARED:\d+", usage).group()


def main() -> int:
    for kernel, constants, warps in KERNELS:
        print(f"{kernel.__module__}.{kernel.__name__}: {compile_kernel(kernel, constants, warps)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
