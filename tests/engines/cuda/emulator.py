"""A device that runs the CUDA kernels on the CPU: emulator.h compiles the unmodified ``.cu`` files, this launches them.

An array argument is copied to memory of its own that ends where a forbidden page begins, and copied back after the
launch: a kernel that reads or writes beyond the end of an array is stopped there, and one that writes before its
beginning is found out afterwards.
"""

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from minunet.base.backend import Array
from minunet.engines.cuda.device import kernel_argument
from minunet.engines.cuda.kernels import Kernels
from minunet.engines.cuda.programs import FOLDER, PROGRAMS, options
from tests import strict_cupy

HEADER = Path(__file__).with_name("emulator.h")
COMPILER = shutil.which("g++") if sys.platform == "linux" else None  # memory is guarded as Linux does it

#: A patch replaces an exact text of a source file: (file, old, new).
Patch = tuple[str, str, str]

LETTERS = {"int32": "i", "uint64": "l", "int64": "l", "float32": "f", "float64": "d"}


class KernelError(AssertionError):
    """A kernel did what the hardware forbids, or leaves undefined."""


#: Kernels of several threads run one after the other, as on a GPU's stream: the emulator has global state.
_STREAM = threading.Lock()


class EmulatedDevice:
    """A :class:`minunet.engines.cuda.device.Device` without a GPU, for arrays of NumPy or of the stand-in for CuPy.

    ``seed`` decides in which order threads run.
    """

    multiprocessors = 2  # few, so that loops over pixels have more than one turn

    def __init__(
        self,
        precision: str,
        seed: int = 0,
        patches: Sequence[Patch] = (),
        hopper: bool = False,
        xp: ModuleType = np,
    ) -> None:
        self.xp = xp
        self.precision, self.seed, self.patches, self.hopper = precision, seed, tuple(patches), hopper
        self.shared_bytes = (227 if hopper else 99) * 1024
        self.row_conflicts: dict[str, int] = {}  # of each kernel: see emulator.h

    def address(self, array: Array) -> int:
        return _on_host(array).ctypes.data

    def launch(
        self, program: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any], shared: int
    ) -> None:
        assert shared <= self.shared_bytes
        library = load(program, self.precision if PROGRAMS[program].precise else "float32", self.patches)
        arguments = list(map(_on_host, arguments))
        roots = {id(root): root for root in map(_root, arguments) if root is not None}
        with _STREAM, _guarded(roots) as moved:

            def address(array: np.ndarray) -> int:
                root = _root(array)
                assert root is not None
                return moved[id(root)] + array.ctypes.data - root.ctypes.data

            values = [kernel_argument(value, address) for value in arguments]
            letters = "".join(
                "p" if value is None or isinstance(value, np.ndarray) else LETTERS[str(number.dtype)]
                for value, number in zip(arguments, values, strict=True)
            )
            buffers = [number.tobytes() for number in values]
            pointers = (ctypes.c_char_p * len(buffers))(*buffers)
            run = getattr(library, f"run_{kernel}")
            if run(blocks, threads, ctypes.c_size_t(shared), self.seed, letters.encode(), pointers):
                raise KernelError(f"{kernel}: {library.emulator_message().decode()}{_where(library, roots, moved)}")
            self.row_conflicts[kernel] = self.row_conflicts.get(kernel, 0) + library.emulator_row_conflicts()


class EmulatedKernels(Kernels):
    """The kernels behind the methods of the specification, as on a GPU."""

    def __init__(self, precision: str, **options: Any) -> None:
        device = EmulatedDevice(precision, **options)
        super().__init__(device, precision)
        self.emulated = device
        self.name = "emulator"


@cache
def load(program: str, precision: str, patches: tuple[Patch, ...] = ()) -> ctypes.CDLL:
    """The shared library of a program, compiled unless the same text has been before.

    Raises ValueError if a patch finds its text not just once.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.cu*"))}
    for file, old, new in patches:
        if texts[file].count(old) != 1:
            raise ValueError(f"{file} must hold the text to patch once, found {texts[file].count(old)} times: {old!r}")
        texts[file] = texts[file].replace(old, new)
    settings = PROGRAMS[program]
    flags = [flag for flag in options(settings, precision) if not flag.startswith("--")]
    # Without fortification: what some systems add to longjmp takes a jump from fiber to fiber for an attack.
    command = ["-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", *flags]
    calls = "\n".join(
        f'extern "C" int run_{kernel}(unsigned int blocks, unsigned int threads, size_t shared, unsigned int seed,\n'
        f"    const char* letters, void** arguments) {{\n"
        f"    return emulator::run<{kernel}>(blocks, threads, shared, seed, letters, arguments);\n}}"
        for kernel in settings.kernels
    )
    main = f'#include "{settings.file}"\n{calls}\n'
    digest = hashlib.sha256(repr((texts, HEADER.read_text(encoding="utf-8"), command, main)).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"minunet-emulator-{os.getuid()}"
    library = folder / f"{program}-{digest[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            for file, text in {**texts, "main.cpp": main}.items():
                (work / file).write_text(text, encoding="utf-8")
            arguments = [COMPILER or "g++", *command, "-include", str(HEADER), "main.cpp", "-o", "main.so"]
            result = subprocess.run(arguments, cwd=work, capture_output=True, text=True, check=False)
            if result.returncode:
                raise KernelError(f"{settings.file} does not compile:\n{result.stderr[:3000]}")
            folder.mkdir(mode=0o700, exist_ok=True)
            partial = folder / f"{program}-{digest[:24]}.{os.getpid()}"
            shutil.copy(work / "main.so", partial)
            partial.replace(library)  # another process may have been faster, with the same result
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
    loaded.emulator_message.restype = ctypes.c_char_p
    loaded.emulator_fault.restype = ctypes.c_size_t
    loaded.emulator_row_conflicts.restype = ctypes.c_longlong
    return loaded


def kernel_names(file: str) -> set[str]:
    """The kernels that a source file defines."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    return set(re.findall(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(', text))


def _on_host(value: Any) -> Any:
    """An array of the stand-in as the NumPy array that it hides; anything else as it is."""
    return value._host if isinstance(value, strict_cupy.ndarray) else value


def _root(value: Any) -> np.ndarray | None:
    """The array that owns the memory of ``value``; None if that is no array."""
    if not isinstance(value, np.ndarray):
        return None
    while isinstance(value.base, np.ndarray):
        value = value.base
    return value


@cache
def _c_library() -> ctypes.CDLL:
    """The functions that reserve memory and forbid pages of it."""
    c = ctypes.CDLL(None, use_errno=True)
    c.mmap.restype = ctypes.c_void_p
    c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    c.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return c


_FRONT = 0xA5  # what lies before an array, and must still do so after the launch


@contextmanager
def _guarded(roots: Mapping[int, np.ndarray]) -> Iterator[dict[int, int]]:
    """Copies of the arrays at the ends of pages, and their addresses by the arrays' ids; copied back at the end."""
    c, page, regions, moved = _c_library(), mmap.PAGESIZE, [], {}
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        for name, root in roots.items():
            size = -(-root.nbytes // 16) * 16  # GPU allocations are aligned; up to 15 bytes of slack are checked below
            length = -(-size // page) * page
            base = c.mmap(None, length + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            assert base not in (None, ctypes.c_void_p(-1).value)
            c.mprotect(base, page, 0)
            c.mprotect(base + page + length, page, 0)
            start = base + page + length - size
            ctypes.memset(base + page, _FRONT, length)
            ctypes.memmove(start, root.ctypes.data, root.nbytes)
            regions.append((base, length, start, size, root))
            moved[name] = start
        yield moved
        for base, _, start, size, root in regions:
            front = ctypes.string_at(base + mmap.PAGESIZE, start - base - mmap.PAGESIZE)
            slack = ctypes.string_at(start + root.nbytes, size - root.nbytes)
            if (front + slack).strip(bytes([_FRONT])):
                raise KernelError(f"wrote outside of an array of {root.nbytes} bytes")
            if root.flags.writeable:
                ctypes.memmove(root.ctypes.data, start, root.nbytes)
    finally:
        for base, length, *_ in regions:
            c.munmap(base, length + 2 * page)


def _where(library: ctypes.CDLL, roots: Mapping[int, np.ndarray], moved: Mapping[int, int]) -> str:
    """In words, which array a forbidden access is near to."""
    fault = library.emulator_fault()
    for name, start in moved.items():
        if fault and start - mmap.PAGESIZE * 2 <= fault <= start + roots[name].nbytes + mmap.PAGESIZE:
            return f", byte {fault - start} of an array of {roots[name].nbytes} bytes"
    return ""
