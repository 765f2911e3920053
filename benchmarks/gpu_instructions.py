"""The loops of a kernel, as the GPU will run them: how many instructions, which, and how long. No GPU is needed.

    python benchmarks/gpu_instructions.py                          convolution and gradient of the weights for Hopper
    python benchmarks/gpu_instructions.py norm --precision tf32    the kernels of another program of programs.py

Cycles are those of a turn of one warp that has its scheduler for itself, and waits neither for other warps nor for what
it copies. The machine code says of each instruction how many cycles the next has to wait, and for which results of
instructions that take longer; these are taken to come after 30 cycles, as from shared memory. Counts and cycles include
all of a loop's branches, of which a turn takes one. Needs NVIDIA's compiler and disassembler: pip install ".[kernels]".

Source: the layout of an instruction's control bits, Jia et al. 2018, "Dissecting the NVIDIA Volta GPU architecture via
microbenchmarking", section 2.1; Hopper's instructions have them at the same places.
"""

import argparse
import collections
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, also where minunet is not installed
    sys.path.insert(0, str(ROOT))

from minunet.base import cli  # noqa: E402
from minunet.base.errors import UserError  # noqa: E402
from minunet.engines.cuda.programs import PROGRAMS  # noqa: E402
from tests.engines.cuda import nvrtc  # noqa: E402

#: Address, opcode, and the rest with the lower half of the encoding; the upper half is on the next line.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*);\s+/\* 0x[0-9a-f]{16} \*/")
UPPER_HALF = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")

LATENCY = 30  # cycles until the result of a read of shared memory is there
COUNTERS = 6  # of a warp, for results that take longer than the code says


@dataclass(frozen=True)
class Instruction:
    """What the warp's scheduler is told of an instruction."""

    address: int
    opcode: str
    target: str | None  # the label that it may branch to
    stall: int  # cycles until the next may follow
    raised: tuple[int, ...]  # the counters that stay up until its result is there, or its operands have been read
    awaited: tuple[int, ...]  # the counters that it waits for


def instruction(address: int, opcode: str, target: str | None, upper: int) -> Instruction:
    """From the upper 64 bits of the encoding: 4 bits stall, 1 yield, 3 and 3 counters (7: none), 6 awaited."""
    control = upper >> 41
    raised = tuple(counter for place in (5, 8) if (counter := control >> place & 7) < COUNTERS)
    awaited = tuple(counter for counter in range(COUNTERS) if control >> (11 + counter) & 1)
    return Instruction(address, opcode, target, control & 15, raised, awaited)


@dataclass(frozen=True)
class Loop:
    """The instructions from a label to the branch that goes back to it."""

    body: tuple[Instruction, ...]

    @property
    def first(self) -> int:
        """Its address in the kernel."""
        return self.body[0].address

    @property
    def length(self) -> int:
        return len(self.body)

    @property
    def opcodes(self) -> collections.Counter[str]:
        return collections.Counter(item.opcode for item in self.body)

    @property
    def cycles(self) -> int:
        """Of a turn, by itself: the second, which may wait for what the first has begun."""
        now, ready, turns = 0, [0] * COUNTERS, []
        for _ in range(2):
            for item in self.body:
                now = max([now, *(ready[counter] for counter in item.awaited)])
                for counter in item.raised:
                    ready[counter] = now + LATENCY
                now += max(item.stall, 1)
            turns.append(now)
        return turns[1] - turns[0]


def disassembler() -> str | None:
    """Where nvdisasm is: in a wheel, or in the CUDA toolkit."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    wheels = [str(path) for folder in folders for path in sorted(folder.glob("*/bin/nvdisasm"))]
    return wheels[0] if wheels else shutil.which("nvdisasm")


def loops(program: str, precision: str, architecture: str = "sm_90") -> dict[str, list[Loop]]:
    """The loops of each kernel of a program, in the order of their ends."""
    tool = disassembler()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(nvrtc.machine_code(program, precision, architecture)[0])
        command = [tool, "--print-code", "--print-instruction-encoding", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("//--------------------- .text.")[1:]:
        name = re.match(r"\w+", part)
        assert name is not None
        found[name[0]] = _loops(part)
    return found


def _loops(text: str) -> list[Loop]:
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    pending: list[str] = []
    lines = text.splitlines()
    for line, following in itertools.pairwise(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label[1])
        elif match := INSTRUCTION.search(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            target, upper = re.search(r"`\((\.L_x_\d+)\)", match[3]), UPPER_HALF.search(following)
            assert upper is not None
            instructions.append(instruction(address, match[2], target[1] if target else None, int(upper[1], 16)))
    result = []
    for item in instructions:
        first = labels.get(item.target, item.address) if item.target else item.address
        if item.opcode == "BRA" and first < item.address:
            result.append(Loop(tuple(other for other in instructions if first <= other.address <= item.address)))
    return result


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["wgmma_128", "wgmma_64", "grad_weight_3x3", "grad_weight_8"]
    parser.add_argument("programs", nargs="*", default=default, metavar="PROGRAM", help="of programs.py")
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="bf16", help="default bf16")
    parser.add_argument("--architecture", default="sm_90", help="default sm_90")
    options = parser.parse_args(arguments)
    if disassembler() is None or nvrtc.library() is None:
        raise UserError("NVIDIA's compiler or disassembler is not here: pip install '.[kernels]'")
    for program in options.programs:
        if program not in PROGRAMS:
            raise UserError(f"{program}: no such program, choose from {', '.join(PROGRAMS)}")
        print(f"| {program}, {options.precision}: kernel | loop at | instructions | cycles | most of them |")
        print("|---|---|---|---|---|")
        for kernel, found in loops(program, options.precision, options.architecture).items():
            for loop in found:
                most = ", ".join(f"{count} {name}" for name, count in loop.opcodes.most_common(6))
                print(f"| {kernel} | {loop.first:#x} | {loop.length} | {loop.cycles} | {most} |")
        print()


if __name__ == "__main__":
    sys.exit(cli.run(main))
