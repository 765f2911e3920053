"""The loops of a kernel, as the GPU will run them: how many instructions, and which. No GPU is needed.

    python benchmarks/gpu_instructions.py                          convolution and gradient of the weights for Hopper
    python benchmarks/gpu_instructions.py norm --precision tf32    the kernels of another program of programs.py

A warp that works by itself takes 8 to 10 cycles for an instruction (docs/engines/gpu.md): so the number of instructions
in a loop says how fast it can be at most. A loop's count includes all its branches, of which a turn takes one. Needs
NVIDIA's compiler and disassembler: pip install ".[kernels]".
"""

import argparse
import collections
import importlib.util
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

from minunet import cli  # noqa: E402
from minunet.engines.cuda.programs import PROGRAMS  # noqa: E402
from minunet.errors import UserError  # noqa: E402
from tests.cuda import nvrtc  # noqa: E402

INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)")  # address and opcode


@dataclass(frozen=True)
class Loop:
    """The instructions from a label to the branch that goes back to it."""

    first: int  # its address in the kernel
    opcodes: collections.Counter[str]

    @property
    def length(self) -> int:
        return self.opcodes.total()


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
        text = subprocess.run([tool, "--print-code", str(path)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("//--------------------- .text.")[1:]:
        name = re.match(r"\w+", part)
        assert name is not None
        found[name[0]] = _loops(part)
    return found


def _loops(text: str) -> list[Loop]:
    labels: dict[str, int] = {}
    instructions: list[tuple[int, str, str | None]] = []
    pending: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label[1])
        elif match := INSTRUCTION.search(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            instructions.append((address, match[2], target[1] if target else None))
    result = []
    for address, opcode, target in instructions:
        if opcode == "BRA" and target in labels and labels[target] < address:
            body = [name for at, name, _ in instructions if labels[target] <= at <= address]
            result.append(Loop(labels[target], collections.Counter(body)))
    return result


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["wgmma_128", "wgmma_128_bulk", "wgmma_64", "grad_weight_3x3", "grad_weight_8"]
    parser.add_argument("programs", nargs="*", default=default, metavar="PROGRAM", help="of programs.py")
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="bf16", help="default bf16")
    parser.add_argument("--architecture", default="sm_90", help="default sm_90")
    options = parser.parse_args(arguments)
    if disassembler() is None or nvrtc.library() is None:
        raise UserError("NVIDIA's compiler or disassembler is not here: pip install '.[kernels]'")
    for program in options.programs:
        if program not in PROGRAMS:
            raise UserError(f"{program}: no such program, choose from {', '.join(PROGRAMS)}")
        print(f"| {program}, {options.precision}: kernel | loop at | instructions | most of them |\n|---|---|---|---|")
        for kernel, found in loops(program, options.precision, options.architecture).items():
            for loop in found:
                most = ", ".join(f"{count} {name}" for name, count in loop.opcodes.most_common(6))
                print(f"| {kernel} | {loop.first:#x} | {loop.length} | {most} |")
        print()


if __name__ == "__main__":
    sys.exit(cli.run(main))
