"""Runs of the command line whose system calls are counted, and end or fail at a chosen one.

Linux on x86-64 only: a seccomp filter stops a process before each call that changes files, and the
process that forked it (by ptrace) looks at the call, kills the run there, lets only half of a
write through before it does, or has the call fail. No compiler and no other program is needed.

A run is forked from a server that has everything imported: `Server` is this side's end of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# name -> number, and which arguments are a descriptor (f), a path (p), or a folder's descriptor
# before a path (d). The last of them is the file that is changed.
CALLS: dict[str, tuple[int, str]] = {
    "write": (1, "f"),
    "open": (2, "p"),
    "pwrite64": (18, "f"),
    "writev": (20, "f"),
    "sendfile": (40, "f"),
    "flock": (73, "f"),
    "fsync": (74, "f"),
    "fdatasync": (75, "f"),
    "truncate": (76, "p"),
    "ftruncate": (77, "f"),
    "rename": (82, "pp"),
    "mkdir": (83, "p"),
    "rmdir": (84, "p"),
    "link": (86, "pp"),
    "unlink": (87, "p"),
    "symlink": (88, ".p"),
    "openat": (257, "dp"),
    "mkdirat": (258, "dp"),
    "unlinkat": (263, "dp"),
    "renameat": (264, "dpdp"),
    "linkat": (265, "dpdp"),
    "symlinkat": (266, ".dp"),
    "fallocate": (285, "f"),
    "pwritev": (296, "f"),
    "renameat2": (316, "dpdp"),
    "copy_file_range": (326, "..f"),
    "pwritev2": (328, "f"),
}
NAMES = {number: name for name, (number, _) in CALLS.items()}
WRITES = {"write", "pwrite64"}
# Those that a full or failing disk refuses.
FAILING = WRITES | {
    *("open", "openat", "mkdir", "mkdirat", "fsync", "fdatasync", "ftruncate", "fallocate"),
    *("rename", "renameat", "renameat2", "sendfile", "copy_file_range", "unlink", "rmdir"),
}
_FLAGS = {"open": 1, "openat": 2}  # which argument says whether a file is made
_CREATES = os.O_CREAT | os.O_TRUNC

_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
# Good system calls apart, threads and children, calls of the filter; none outlives the tracer.
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000
_SECCOMP_EVENT = 7
_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]  # noqa: RUF012


class _Filter(ctypes.Structure):
    _fields_ = [  # noqa: RUF012
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter))]  # noqa: RUF012


@dataclass(frozen=True)
class Run:
    """How a run ended, and the calls that changed something below its folder."""

    code: int
    calls: list[tuple[str, str]]  # name, path relative to the folder
    out: str
    err: str


class Server:
    """A process that forks runs; it ends when its input does."""

    def __init__(self) -> None:
        here = Path(__file__).resolve()
        environment = {**os.environ, "COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            text=True,
        )

    def run(
        self, folder: Path, words: Sequence[object], how: str = "count", at: int = 0, error: int = 0
    ) -> Run:
        """Run `eutectic WORDS`; `how` is what becomes of call `at`, counted from 1.

        "count": nothing; "kill": the run is killed before it; "torn": half is written, and the run
        is killed; "fail": the call does nothing and gives `error`, once; "full": so do all later
        ones that need room on the disk.
        """
        asked = {"folder": str(folder), "words": [str(w) for w in words]}
        answer = self._ask({**asked, "how": how, "at": at, "error": error})
        calls = [(name, path) for name, path in answer["calls"]]
        return Run(answer["code"], calls, answer["out"], answer["err"])

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of runs ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


def can_trace() -> bool:
    """Tell whether this machine lets a process trace its children."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = _traced(Path(folder), lambda: Path(folder, "made").mkdir(), "kill", 1, 0)
        except OSError:
            return False
        return found == (-signal.SIGKILL, [("mkdir", "made")]) and not Path(folder, "made").exists()


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_ulong, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    return libc


def _ptrace(libc: ctypes.CDLL, request: int, thread: int, data: Any = None) -> bool:
    """Do as asked; False where the thread is gone, as after a kill of the whole process."""
    if libc.ptrace(request, thread, None, data) != -1:
        return True
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        return False
    raise OSError(number, os.strerror(number))


def _stop_before_calls(libc: ctypes.CDLL) -> None:
    """Install the filter in this process, and in the threads that it starts from here on."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    trace, allow = 0x7FF00000, 0x7FFF0000
    plain = [number for name, (number, _) in CALLS.items() if name not in _FLAGS]
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, allow), (load, 0, 0, 0)]
    for number in plain:
        program += [(equal, 0, 1, number), (give, 0, 0, trace)]
    for name, place in _FLAGS.items():
        program += [
            (equal, 0, 4, CALLS[name][0]),
            (load, 0, 0, 16 + 8 * place),
            (any_bit, 0, 1, _CREATES),
            (give, 0, 0, trace),
            (give, 0, 0, allow),
        ]
    program.append((give, 0, 0, allow))
    filters = (_Filter * len(program))(*(_Filter(*step) for step in program))
    described = _Program(len(program), filters)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(described), 0, 0):
        os._exit(97)


def _path(thread: int, registers: _Registers, name: str, folder: Path) -> list[str]:
    """Return the paths below `folder` that a call is about, relative to it."""
    values = [getattr(registers, r) for r in ("rdi", "rsi", "rdx", "r10", "r8", "r9")]
    found: list[str] = []
    start = _link(f"/proc/{thread}/cwd")
    for kind, value in zip(CALLS[name][1], values, strict=False):
        if kind == "d":
            number = ctypes.c_int(value & 0xFFFFFFFF).value
            where = f"fd/{number}" if number >= 0 else "cwd"
            start = _link(f"/proc/{thread}/{where}")
        elif kind == "f":
            with contextlib.suppress(OSError):
                found.append(_link(f"/proc/{thread}/fd/{value & 0xFFFFFFFF}"))
        elif kind == "p":
            found.append(os.path.join(start, os.fsdecode(_text(thread, value))))  # noqa: PTH118
    inside = f"{folder}{os.sep}"
    return [p.removeprefix(inside) for p in found if p.startswith(inside)]


def _link(path: str) -> str:
    return str(Path(path).readlink())


def _text(thread: int, address: int) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        memory.seek(address)
        text = b""
        while b"\0" not in text:
            # Not past the page: what follows may not be there.
            text += memory.read(4096 - (address + len(text)) % 4096)
    return text[: text.index(b"\0")]


def _traced(
    folder: Path, target: Any, how: str, at: int, error: int
) -> tuple[int, list[tuple[str, str]]]:
    """Fork, run `target`, and do to call `at` as `how` says."""
    libc = _libc()
    process = os.fork()
    if process == 0:
        code = 96
        try:
            libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            _stop_before_calls(libc)
            target()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    _ptrace(libc, _SETOPTIONS, process, _OPTIONS)
    _ptrace(libc, _CONT, process)
    calls: list[tuple[str, str]] = []
    full = False
    while True:
        thread, status = os.waitpid(-1, 0x40000000)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == process:
                return os.waitstatus_to_exitcode(status), calls
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _SECCOMP_EVENT:
            registers = _Registers()
            if not _ptrace(libc, _GETREGS, thread, ctypes.byref(registers)):
                continue
            name = NAMES[registers.orig_rax]
            paths = _path(thread, registers, name, folder)
            if paths:
                calls.append((name, " -> ".join(paths)))
                here = len(calls) == at
                if here and how == "torn" and name in WRITES:
                    registers.rdx //= 2
                    _ptrace(libc, _SETREGS, thread, ctypes.byref(registers))
                    _ptrace(libc, _SYSCALL, thread)
                    os.waitpid(thread, 0x40000000)
                if here and how in ("kill", "torn"):
                    os.kill(process, signal.SIGKILL)
                    continue
                full = full or (here and how == "full")
                room = name in FAILING - {"unlink", "rmdir", "rename", "renameat", "renameat2"}
                if (here and how == "fail" and name in FAILING) or (full and room):
                    # Another number than any call's: nothing is done, and `rax` is the answer.
                    registers.orig_rax = 2**64 - 1
                    registers.rax = 2**64 - error
                    _ptrace(libc, _SETREGS, thread, ctypes.byref(registers))
        own_stop = event or number in (signal.SIGSTOP, signal.SIGTRAP, signal.SIGTRAP | 0x80)
        _ptrace(libc, _CONT, thread, None if own_stop else int(number))


def _command(words: list[str], streams: list[str], modules: str | None) -> None:
    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    from eutectic.cli.main import main

    sys.argv = ["eutectic", *words]
    try:
        main()
    finally:
        if modules is not None:
            Path(modules).write_text("\n".join(sys.modules))


def _serve(requests: Iterator[str]) -> None:
    """Answer requests. What the first run of a verb imports, later ones find imported."""
    import torch

    torch.set_num_threads(1)
    known: set[str] = set()
    answers = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as own:
        streams = [str(Path(own, name)) for name in ("out", "err")]
        for line in requests:
            asked = json.loads(line)
            verb = asked["words"][0]
            modules = None if verb in known else str(Path(own, "modules"))

            def target(words: list[str] = asked["words"], modules: str | None = modules) -> None:
                _command(words, streams, modules)

            where = Path(asked["folder"]).resolve()
            code, calls = _traced(where, target, asked["how"], asked["at"], asked["error"])
            out, err = (Path(path).read_text(errors="replace") for path in streams)
            answer = {"code": code, "calls": calls, "out": out, "err": err}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if modules is not None and Path(modules).exists():
                known.add(verb)
                for name in Path(modules).read_text().split("\n"):
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
                gc.collect()
                gc.freeze()  # what is not touched is not copied


if __name__ == "__main__":
    _serve(iter(sys.stdin))
