"""Run one untrusted program in this process, behind everything the platform offers.

`sandbox.py` starts this file as a script of its own. It imports the standard library alone, takes
an order (JSON) on its standard input, and answers on its standard output in two lines: what is
isolated, and how the program ended. Three layers of Linux are tried, and each works without root:
Landlock (files, TCP, signals), seccomp (system calls) and namespaces (network, IPC).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
from pathlib import Path
from typing import Any

# As (x86-64, AArch64); from number 424 on all platforms agree. None: the platform has no such call.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # Network. Landlock knows TCP alone, and a socket of the machine is a way out as well.
    "socket": (41, 198),
    # Processes: no second one, and no other program in place of this one.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # Other processes: signals, memory, priorities.
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Memory that the limit does not count, or that outlives the process.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # Files outside that belong to this user: Landlock guards no attributes, and the size only from
    # Linux 6.2 on.
    "truncate": (76, 45),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # Parts of the kernel that programs do not need and attacks use.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "personality": (135, 92),
    "syslog": (103, 116),
}
WITHOUT_EFFECT: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}
"""Attributes of files, too. They do nothing and succeed, since `shutil.copy` ends with them."""
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
COMMANDS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    # The kernel sends a signal of the program's choice to the owner of a pipe or socket, whom
    # F_SETOWN, F_SETOWN_EX, FIOSETOWN and SIOCSPGRP name. Landlock stops it from Linux 6.12 on.
    "fcntl": ((72, 25), (8, 15)),
    "ioctl": ((16, 29), (0x8901, 0x8902)),
}
"""Calls of which only some commands are forbidden: their numbers, and those commands."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables above, and the kernel's name of the platform."""
CLONE_THREAD = 0x10000
X32_CALLS = 0x40000000
EPERM, ENOSYS = 1, 38

# BPF: load a word, jump if equal / at least / a bit is set, return.
LOAD, JEQ, JGE, JSET, RET = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Rights on files that each version of Landlock knows."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1, 2, 4, 8, 1 << 14
NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, network, IPC, UTS
CAPABILITIES = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Take an order, shut this process in, run the program, and answer."""
    order = json.loads(sys.stdin.buffer.read())
    answer = _keep_answer()
    _limit(order)
    isolated = isolate(os.getcwd())
    os.write(answer, json.dumps(isolated).encode() + b"\n")
    ended = _run(order["program"])
    # The secret shows that the program ran to its end: who leaves early cannot know it by chance.
    os.write(answer, json.dumps([order["secret"], *ended]).encode() + b"\n")
    os._exit(0)


def _keep_answer() -> int:
    """Move the standard output away from the program, and give it empty ones."""
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return answer


def _limit(order: dict[str, Any]) -> None:
    """Set limits of this process that it cannot raise."""
    memory, seconds = order["memory"], order["seconds"]
    limits = {
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": order["file_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in limits.items():
        # Linux has all of them; other platforms have some, and macOS refuses the first.
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, highest = resource.getrlimit(kind)
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        with contextlib.suppress(ValueError):
            resource.setrlimit(kind, (value, value))
    # The signal first, so that the parent can tell the limit from a kill.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def isolate(folder: str) -> list[str]:
    """Shut this process in, with `folder` as the only place to write; return what is isolated."""
    done: set[str] = set()
    if sys.platform != "linux":
        return []
    # Before the others: it needs rights that they take.
    if _enter_namespaces():
        done.add("network")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    if _confine_files(folder):
        done.add("files")
    if _filter_calls():
        done |= {"network", "processes", "signals"}
    else:
        # Of an ordinary user: no second process, at the price of threads.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return sorted(done)


def _enter_namespaces() -> bool:
    """Leave the machine's network and IPC, where an ordinary user may."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMESPACES) != 0:
        return False
    try:
        # Without a map of its own user this process could not open its own files.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return False
    return True


def _drop_capabilities() -> None:
    """Give up what root, or the first process of a namespace, may do."""
    header = struct.pack("Ii", CAPABILITIES, 0)
    libc.capset(header, bytes(24))


def _confine_files(folder: str) -> bool:
    """Allow reading of Python and its libraries, and everything in `folder`, by Landlock."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << RIGHTS.get(version, 16)) - 1
    # Also: no TCP from version 4 on, and no signals to processes outside from version 6 on.
    wanted = [rights] + ([0b11] if version >= 4 else []) + ([0b11] if version >= 6 else [])
    rules = struct.pack(f"{len(wanted)}Q", *wanted)
    ruleset = libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset < 0:
        return False
    # A directory may be renamed or linked from the folder to the folder alone.
    _allow(ruleset, folder, rights)
    for path in _libraries():
        _allow(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
    for path in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _allow(ruleset, path, (READ_FILE | WRITE_FILE | TRUNCATE) & rights)
    return bool(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0)


def _libraries() -> set[str]:
    """Return where Python, its packages and the system's shared libraries lie."""
    found = {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"}
    found |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    # Not all of sys.path: an editable installation puts the user's sources there.
    found |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    # Shared libraries of a Python that is not the system's.
    return found | {os.path.join(sys.base_prefix, "lib")}


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= ~READ_DIR
    rule = struct.pack("=Qi", rights, opened)
    libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
    os.close(opened)


def _filter_calls() -> bool:
    """Forbid the system calls of FORBIDDEN, and clones that are no threads, by seccomp."""
    if platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return False
    column, architecture = MACHINES[platform.machine()]
    code = struct.pack
    steps = [
        _step(code, LOAD, 0, 0, ARCHITECTURE),
        _step(code, JEQ, 1, 0, architecture),
        _step(code, RET, 0, 0, KILL),
        _step(code, LOAD, 0, 0, NUMBER),
        _step(code, JGE, 0, 1, X32_CALLS),
        _step(code, RET, 0, 0, ERROR | EPERM),
    ]
    for numbers in FORBIDDEN.values():
        number = numbers[column]
        if number is not None:
            steps += [_step(code, JEQ, 0, 1, number), _step(code, RET, 0, 0, ERROR | EPERM)]
    for numbers in WITHOUT_EFFECT.values():
        number = numbers[column]
        if number is not None:
            steps += [_step(code, JEQ, 0, 1, number), _step(code, RET, 0, 0, ERROR)]
    for call, commands in COMMANDS.values():
        # Another call jumps over these steps, so that the next ones still see its number.
        steps += [_step(code, JEQ, 0, 2 * len(commands) + 2, call[column])]
        steps += [_step(code, LOAD, 0, 0, SECOND_ARGUMENT)]
        for command in commands:
            steps += [_step(code, JEQ, 0, 1, command), _step(code, RET, 0, 0, ERROR | EPERM)]
        steps += [_step(code, RET, 0, 0, ALLOW)]
    # glibc then takes clone, whose flags a filter can read.
    steps += [_step(code, JEQ, 0, 1, CLONE3[column]), _step(code, RET, 0, 0, ERROR | ENOSYS)]
    steps += [
        _step(code, JEQ, 0, 4, CLONE[column]),
        _step(code, LOAD, 0, 0, ARGUMENT),
        _step(code, JSET, 0, 1, CLONE_THREAD),
        _step(code, RET, 0, 0, ALLOW),
        _step(code, RET, 0, 0, ERROR | EPERM),
        # Limits of itself, and of no other process.
        _step(code, JEQ, 0, 3, PRLIMIT[column]),
        _step(code, LOAD, 0, 0, ARGUMENT),
        _step(code, JEQ, 1, 0, 0),
        _step(code, RET, 0, 0, ERROR | EPERM),
        _step(code, RET, 0, 0, ALLOW),
    ]
    filters = ctypes.create_string_buffer(b"".join(steps))
    program = code("HxxxxxxQ", len(steps), ctypes.addressof(filters))
    return bool(libc.prctl(PR_SET_SECCOMP, FILTER, program, 0, 0) == 0)


def _step(pack: Any, code: int, if_true: int, if_false: int, value: int) -> bytes:
    packed: bytes = pack("HBBI", code, if_true, if_false, value)
    return packed


def _run(program: str) -> tuple[str, str]:
    """Run the program in empty names; return "passed" or "failed", and why."""
    try:
        # Without a `__name__`, as in Hugging Face's code_eval: what is under a model's
        # `if __name__ == "__main__":` is not run.
        exec(compile(program, "<program>", "exec"), {})
    except BaseException as error:  # also SystemExit: a program that leaves has not passed
        return "failed", f"{type(error).__name__}: {error}"[:200]
    return "passed", ""


if __name__ == "__main__":
    main()
