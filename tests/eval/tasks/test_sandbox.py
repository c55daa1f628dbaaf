"""The sandbox, against hostile programs."""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xlstm_eval.records import EvalError
from xlstm_eval.tasks import guest
from xlstm_eval.tasks.sandbox import (
    ISOLATED,
    MACHINES,
    Limits,
    not_isolated,
    require_sandbox,
    run_program,
    run_programs,
)

LIMITS = Limits(seconds=3, wall_seconds=30.0, memory=2**29, file_bytes=2**20)
INCLUDE, GENERIC = Path("/usr/include"), "asm-generic/unistd.h"
SHORT = Limits(seconds=1, wall_seconds=3.0)


def needs(what: str) -> pytest.MarkDecorator:
    """Leave a test out where the kernel cannot isolate (no Landlock, no seccomp)."""
    assert what in ISOLATED
    reason = f"this platform does not isolate {what}"
    return pytest.mark.skipif(what in not_isolated(), reason=reason)


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """After every program this process lives, and no folder of a program does."""
    # Of this test alone: other processes run programs at the same time.
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert not list(temporary.glob("xlstm-code-*"))


def test_a_program_that_runs_to_its_end_passes() -> None:
    require_sandbox()
    outcome = run_program("open('note', 'w').write('x')\nassert open('note').read() == 'x'")
    assert outcome.passed, outcome


@pytest.mark.skipif(sys.platform != "linux", reason="the calls of Linux")
def test_a_machine_whose_calls_are_not_known_is_refused() -> None:
    with pytest.raises(EvalError, match="system calls on riscv64 are not known"):
        require_sandbox("riscv64")
    assert tuple(guest.MACHINES) == MACHINES


def test_numbers_of_system_calls_are_those_of_the_kernels_headers() -> None:
    """AArch64 has the generic table; a header of either platform is on most machines."""
    commands = {name: numbers for name, (numbers, _) in guest.COMMANDS.items()}
    numbers = (
        guest.FORBIDDEN
        | guest.WITHOUT_EFFECT
        | commands
        | {
            "clone": guest.CLONE,
            "clone3": guest.CLONE3,
            "prlimit64": guest.PRLIMIT,
            "landlock_create_ruleset": (guest.LANDLOCK_CREATE, guest.LANDLOCK_CREATE),
            "landlock_restrict_self": (guest.LANDLOCK_RESTRICT, guest.LANDLOCK_RESTRICT),
        }
    )
    headers = [next(iter(INCLUDE.glob("*/asm/unistd_64.h")), None), INCLUDE / GENERIC]
    found = [header for header in headers if header is not None and header.is_file()]
    if not found:
        pytest.skip("no headers of the kernel")
    for column, header in enumerate(headers):
        if header not in found:
            continue
        lines = re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
        known = {line[1]: int(line[2]) for line in lines}
        for name, own in numbers.items():
            # An older kernel's header lacks the newest calls.
            assert known.get(name, own[column]) == own[column], name
    # EM_X86_64 and EM_AARCH64, 64 bits, little endian (linux/audit.h).
    assert guest.MACHINES["x86_64"][1] == 62 | 0xC0000000
    assert guest.MACHINES["aarch64"][1] == 183 | 0xC0000000


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'wrong sum'", "AssertionError: wrong sum"),
        ("def f(:", "SyntaxError"),
        # Leaving early is not passing, whatever the code says.
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended with code 0"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
        ("input()", "EOFError"),
        # An answer that it made up, on every stream that it can find.
        (
            'import os\nfor n in range(3, 64):\n  try: os.write(n, b\'["0", "passed", ""]\\n\')\n'
            "  except OSError: pass\nos._exit(0)",
            "ended with code 0",
        ),
    ],
)
def test_other_programs_fail(program: str, reason: str) -> None:
    outcome = run_program(program, LIMITS)
    assert outcome.status == "failed"
    assert reason in outcome.reason


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)"], ids=["loop", "sleep"]
)
def test_a_program_without_end_is_ended(program: str) -> None:
    started = time.monotonic()
    assert run_program(program, SHORT).status == "timed out"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = []\nwhile True: x.append(bytearray(10**8))", "MemoryError"),
        ("f = open('big', 'wb')\nfor _ in range(9): f.write(bytes(10**6))", "File too large"),
        (
            "import threading, time\nwhile True:\n"
            "  threading.Thread(target=time.sleep, args=(60,)).start()",
            "can't start new thread",
        ),
        ("x = [open('/dev/null') for _ in range(100)]", "Too many open files"),
    ],
    ids=["memory", "file", "threads", "open files"],
)
def test_bombs_do_not_go_off(program: str, reason: str) -> None:
    outcome = run_program(program, LIMITS)
    assert outcome.status == "failed"
    assert reason in outcome.reason


def test_an_answer_of_brackets_does_not_end_this_process() -> None:
    program = "import os\nfor n in range(3, 64):\n  try: os.write(n, b'[' * 60_000 + b'\\n')\n"
    assert not run_program(program + "  except OSError: pass", LIMITS).passed


def test_much_output_goes_nowhere() -> None:
    assert run_program("for _ in range(10_000): print('x' * 1000)", LIMITS).passed
    # Straight into the stream of the answer: reading ends, and so does the program.
    flood = "import os\nwhile True:\n  for n in range(3, 64):\n    try: os.write(n, b'x' * 65536)\n"
    flood += "    except OSError: pass"
    assert not run_program(flood, LIMITS).passed


@needs("processes")
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.system('true') == 0 or 1 / 0",
    ],
    ids=["fork bomb", "subprocess", "exec", "shell"],
)
def test_there_is_no_second_process(program: str) -> None:
    assert run_program(program, LIMITS).status == "failed"


@needs("signals")
@pytest.mark.parametrize(
    "program",
    [
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
        # A signal that the kernel sends in the program's place.
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        # It would make the kernel end this process instead.
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    ],
    ids=["parent", "all", "owner of a pipe", "limits"],
)
def test_other_processes_are_out_of_reach(program: str) -> None:
    outcome = run_program(program, LIMITS)
    assert outcome.status == "failed"
    assert "PermissionError" in outcome.reason or "ProcessLookupError" in outcome.reason


@needs("files")
def test_files_outside_are_out_of_reach(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("private")
    for attempt in (
        f"open({str(mine)!r}).read()",
        f"open({str(mine)!r}, 'w').write('lost')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.symlink({str(mine)!r}, 'link'); open('link').read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import os; os.listdir('/')",
    ):
        outcome = run_program(attempt, LIMITS)
        assert "PermissionError" in outcome.reason, (attempt, outcome)
    assert mine.read_text() == "private"
    assert list(tmp_path.iterdir()) == [mine]


@needs("files")
def test_attributes_of_files_outside_stay(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("private")
    before = mine.stat()
    for attempt in ("chmod(mine, 0)", "utime(mine, (5, 5))", "chown(mine, 1, 1)"):
        run_program(f"import os\nmine = {str(mine)!r}\nos.{attempt}", LIMITS)
        now = mine.stat()
        assert (now.st_mode, now.st_mtime_ns) == (before.st_mode, before.st_mtime_ns), attempt
    # By seccomp, also where Landlock would let it pass.
    for attempt in ("truncate(mine, 0)", "setxattr(mine, 'user.a', b'')"):
        outcome = run_program(f"import os\nmine = {str(mine)!r}\nos.{attempt}", LIMITS)
        assert "Errno 1" in outcome.reason, attempt
    # In its own folder, a program may copy and lock files; their mode stays.
    program = "import fcntl, os, shutil\nfile = open('a', 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    program += "os.fchmod(file.fileno(), 0)\nassert os.fstat(file.fileno()).st_mode & 0o600\n"
    outcome = run_program(f"{program}shutil.copy2('a', 'b')\nshutil.copy('a', 'c')", LIMITS)
    assert outcome.passed, outcome


def test_secrets_of_the_environment_do_not_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    assert run_program("import os; assert 's3cret' not in str(os.environ)", LIMITS).passed


@needs("files")
def test_secrets_of_this_process_do_not_get_in() -> None:
    program = "import os; open(f'/proc/{os.getppid()}/environ').read()"
    assert "PermissionError" in run_program(program, LIMITS).reason


@needs("network")
def test_there_is_no_network() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.0)
        place = listening.getsockname()
        program = f"import socket; socket.create_connection({place!r}, timeout=1)"
        assert run_program(program, LIMITS).status == "failed"
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_equal_programs_run_once_and_order_stays(tmp_path: Path) -> None:
    programs = ["x = 1", "1 / 0", "x = 1", "assert False"]
    found = run_programs(programs, LIMITS)
    assert [outcome.passed for outcome in found] == [True, False, True, False]
    assert found[0] is found[2]
