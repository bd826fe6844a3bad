"""The machine code that Triton makes for a GPU, which need not be present: compiled, disassembled and counted.

`launches` runs a function that launches kernels, on tensors of the device "meta", and compiles what it launches as for
a GPU, with everything on which Triton specialises, such as alignments and strides of 1.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from avion.errors import UserError

# An instruction belongs to the class of the first pattern that its text matches.
CLASSES = {
    "spills": r"(LDL|STL)\b",
    "shared memory": r"(LDS|STS|LDSM|STSM|BAR|LDGSTS|ATOMS)\b",
    "shuffles": r"SHFL\b",
    "MUFU": r"MUFU\b",
    "loads": r"(LDG|LD|LDC|ULDC)\b",
    "stores": r"(STG|ST|RED|ATOMG)\b",
    # A bfloat16 becomes a float32 by a shift or a mask.
    "conversions": r"(F2F|F2FP|F2I|I2F|I2FP|HADD2|PRMT)\b|U?SHF\.L\.U32 .*, 0x10,|U?LOP3\.LUT .*0xffff0000"
    r"|IMAD\.U32 .*, 0x10000,",
    "FP32": r"(FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FCHK|FADD32I|FMUL32I|FFMA32I)\b",
    "integer, address, control": r"",
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Loop(NamedTuple):
    """The instructions first … end - 1, inside `depth` other loops."""

    first: int
    end: int
    depth: int


class Launch(NamedTuple):
    """A kernel as it was launched: its name and constants, how many programs of how many warps, and its code."""

    kernel: str
    constants: dict[str, Any]
    programs: int
    warps: int
    registers: int
    local_bytes: int
    instructions: list[str]
    loops: list[Loop]

    def own(self, loop: Loop | None) -> list[str]:
        """Return the instructions of a loop that no inner loop repeats; without a loop, those that no loop repeats."""
        first, end = (0, len(self.instructions)) if loop is None else (loop.first, loop.end)
        depth = -1 if loop is None else loop.depth
        inner = [x for x in self.loops if x.depth == depth + 1 and first <= x.first and x.end <= end]
        inside = {i for x in inner for i in range(x.first, x.end)}
        return [self.instructions[i] for i in range(first, end) if i not in inside]

    def is_innermost(self, loop: Loop) -> bool:
        return not any(x.depth > loop.depth and loop.first <= x.first and x.end <= loop.end for x in self.loops)


def count_by_class(instructions: list[str]) -> Counter[str]:
    """Return how many instructions belong to each of `CLASSES`."""
    return Counter(next(name for name, p in CLASSES.items() if re.match(p, text)) for text in instructions)


def launches(work: Callable[[], object], capability: int = 90) -> list[Launch]:
    """Compile what `work` launches for GPUs of this compute capability.

    Raises:
        UserError: Kernels are interpreted, and so not compiled.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so that Triton interprets its kernels; unset it to compile them")
    found: list[Launch] = []
    run, driver = JITFunction.run, triton.runtime.driver
    before = driver._active

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        named = dict(zip(self.arg_names, args, strict=False)) | options
        found.append(_launch(self.fn.__name__, _constants(self, named), grid[0], compiled))
        return compiled

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        work()
    finally:
        JITFunction.run = run
        driver.set_active(before)
    return found


class _Target:
    """The part of Triton's driver that the compiler needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _constants(kernel: JITFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the values for which the kernel is compiled; those of a record by the names of its fields."""
    values = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    records = [dataclasses.asdict(value) for value in values.values() if dataclasses.is_dataclass(value)]
    return {name: value for part in (values, *records) for name, value in part.items()}


def _launch(kernel: str, constants: dict, programs: int, compiled: Any) -> Launch:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instructions, labels = parse(code)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    loops = find_loops(instructions, labels)
    return Launch(
        kernel,
        constants,
        programs,
        compiled.metadata.num_warps,
        resources["REG"],
        resources["STACK"],
        instructions,
        loops,
    )


def parse(code: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions of nvdisasm's text, without predicates and without the padding at the end, and the
    labels.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found.group(1))
    # The end is a jump to itself and padding.
    while instructions and re.match(r"NOP\b|BRA\b", instructions[-1]):
        if instructions[-1].startswith("BRA") and _target(instructions[-1], labels) != len(instructions) - 1:
            break
        instructions.pop()
    return instructions, labels


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    found = re.search(r"\.L_x_\d+", instruction)
    return labels.get(found.group()) if found else None


def find_loops(instructions: list[str], labels: dict[str, int]) -> list[Loop]:
    """Find the loops, outer ones first: each begins at the target of a backward jump and ends at the last jump to this
    target.
    """
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        if instruction.startswith("BRA"):
            target = _target(instruction, labels)
            if target is not None and target <= i:
                ends[target] = max(ends.get(target, 0), i + 1)
    spans = sorted(ends.items(), key=lambda s: (s[0], -s[1]))
    return [Loop(a, b, sum(c <= a and b <= d and (c, d) != (a, b) for c, d in spans)) for a, b in spans]
