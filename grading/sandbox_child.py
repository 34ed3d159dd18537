r"""The box: one Python program, run by a process that has given up every right before the first line of it.

A script of its own, started by grading/sandbox.py for every run, so that nothing of the trainer's process (threads, open files,
memory) is near. It becomes three processes, and whichever is killed, the kernel ends those to its right:

    grading/sandbox.py ──▶ grading/sandbox_child.py ─────────────────▶ process 1 of a new pid namespace ──▶ the program
                   makes the namespaces,     makes the root and waits;            gives up all rights,
                   waits outside             with it the namespace ends           becomes python -c DRIVER

| step | why |
|---|---|
| namespaces: mount, pid, net, ipc, uts | no file, process, network, shared memory or host name of the machine |
| a root of its own | of the files only what Python needs, read-only; no /proc, no /sys, no programs; /tmp in memory |
| a user nobody is; no capabilities, none to gain | no one's files, no rights over the namespaces, no set-user-id programs |
| limits | address space, processor time, size of files, open files, threads |
| a filter on system calls | one process only; no memory beyond its address space; less of the kernel within reach |

An ordinary user enters by a user namespace, which is what gives the right to make the others. Root needs none, and none can
be made inside. Anything that fails here ends the box before the program starts, and is reported.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

MIB = 1 << 20
FOLDER = 64 * MIB  # /tmp, and the largest file
STACK = (
    64 * MIB
)  # recursion through C (functools.cache) takes more than the usual 8; each thread reserves as much
THREADS = 32
FILES = 64

# What solutions take for granted, as on the sites the problems come from: these names, exit(), and deep recursion.
# The builtins come last, as math and operator have other functions of their names (pow without a modulus).
PRELUDE = """
import bisect
import collections
import copy
import functools
import heapq
import itertools
import math
import operator
import re
import string
import sys
from bisect import *; from collections import *; from copy import *; from functools import *; from heapq import *
from itertools import *; from math import *; from operator import *; from typing import *; from builtins import *
exit = quit = sys.exit
sys.setrecursionlimit(50_000)
"""

# What Python runs in the box; its arguments are the source's file descriptor and the function's name, or "".
# A function's result has a way out of its own, so that nothing it prints is taken for the result.
DRIVER = f"""
import sys
with open(int(sys.argv[1]), "rb") as file:
    source = file.read()
name = sys.argv[2]
if name:
    import json
    import os
    arguments = [json.loads(line) for line in sys.stdin if line.strip()]
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
space = {{"__name__": "solution" if name else "__main__"}}
exec({PRELUDE!r}, space)
space.pop(name, None)  # the function has to be the program's own
exec(compile(source, "program.py", "exec"), space)
if name:
    function = getattr(space["Solution"](), name) if "Solution" in space else space[name]
    json.dump(function(*arguments), result)
    result.close()
"""

# Numbers of the kernel's interface: <linux/sched.h>, <linux/mount.h>, <linux/fcntl.h>, <linux/prctl.h>.
NEW_MOUNT, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    1 << 17,
    1 << 26,
    1 << 27,
    1 << 28,
    1 << 29,
    1 << 30,
)
NAMESPACES = NEW_MOUNT | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 1 << 12, 1 << 14, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, -100, 0x8000, 1, 2
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS, SECCOMP_FILTER = 1, 22, 38, 2

# Calls that are refused, with their numbers on x86-64 and ARM64: further processes; memory that belongs to no address
# space; sockets, some of whose families know no namespaces; keys, traces, the kernel's log, and what invites trouble.
ARCHITECTURES = {
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}  # as in <linux/audit.h>; column below
REFUSED = {
    "fork": (57, None), "vfork": (58, None), "unshare": (272, 97), "setns": (308, 268), "socket": (41, 198),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "syslog": (103, 116), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}  # fmt: skip
CLONE, CLONE3, THREAD = (56, 220), 435, 1 << 16
EPERM, ENOSYS = 1, 38

LIBC = ctypes.CDLL(None, use_errno=True)


def enter(source: int, report: int, function: str, seconds: int, memory_mb: int) -> int:
    """Run the program that the file `source` holds; its exit status, or 128 + the signal that ended it.

    `function` is the one to call, "" for none; `report` a file for what goes wrong here. Two of the three processes
    return from here, the program never does. Raises OSError.
    """
    os.set_inheritable(
        report, False
    )  # closed when the program starts: what is reported comes from here
    call("prctl", SET_PDEATHSIG, signal.SIGKILL)
    write(
        "/proc/self/oom_score_adj", "1000"
    )  # should memory run out, let it not be the trainer that pays
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call("unshare", NAMESPACES)
        # A user who owns nothing, and but for a rare chance no other box: from systemd's range for transient users.
        user = group = 61184 + os.getpid() % 4336
    else:
        call("unshare", NAMESPACES | NEW_USER)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{user} {user} 1")
        write("/proc/self/gid_map", f"{group} {group} 1")
    if first := os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        return wait(first)
    call("prctl", SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
    signal.alarm(seconds + 5)  # should the others have died before they could be told of it
    make_root()
    call("sethostname", b"box", 3)
    if program := os.fork():
        return wait(program)
    if os.geteuid() == 0:
        call("setgroups", 0, None)
        call("setresgid", group, group, group)
        call(
            "setresuid", user, user, user
        )  # which ends all capabilities; an ordinary user's end with execve
    set_limits(seconds, memory_mb * MIB)
    filter_calls()
    arguments = [sys.executable, "-S", "-s", "-P", "-B", "-c", DRIVER, str(source), function]
    # No locale is set, so text is UTF-8. The order of a set is the same every time, and so is the verdict.
    os.execve(sys.executable, arguments, {"HOME": "/tmp", "PYTHONHASHSEED": "0"})


def wait(process: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def make_root() -> None:
    """Move to a root of the few files that Python needs. All but /tmp is read-only, whoever owns it outside."""
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    wanted += [sys.executable, f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    wanted += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    sources = {path: os.path.realpath(path) for path in sorted(wanted) if os.path.exists(path)}

    mount("none", "/", "", RECURSIVE | PRIVATE)  # or these mounts would show outside
    mount("box", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    call("pivot_root", b".", b"old")
    os.chdir("/")
    for path, source in sources.items():
        if os.path.exists(path):
            continue  # it came with a folder above it
        if os.path.isdir("/old" + source):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(path, "")
        mount("/old" + source, path, "", BIND | RECURSIVE)
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    os.makedirs("/tmp", exist_ok=True)
    attributes = struct.pack(
        "4Q", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0
    )  # set, clear, propagation, user namespace
    call(
        "syscall",
        MOUNT_SETATTR,
        AT_FDCWD,
        b"/",
        AT_RECURSIVE,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    mount("box", "/tmp", "tmpfs", NOSUID | NODEV, f"size={FOLDER},nr_inodes=4096,mode=1777")
    os.chdir("/tmp")


def set_limits(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds
        + 1,  # of all threads; the caller's clock is the one that counts
        resource.RLIMIT_FSIZE: FOLDER,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: THREADS,  # counted by user and user namespace, so of this box alone
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(
        resource.RLIMIT_STACK, (STACK if hard == resource.RLIM_INFINITY else min(STACK, hard), hard)
    )


def filter_calls() -> None:
    """From here on the calls in `REFUSED` answer EPERM, and clone makes threads only. It cannot be undone.

    The kernel runs the filter, a program of classic BPF, before every call; what it sees is struct seccomp_data:
    the call's number at byte 0, the architecture at 4, the low half of the first argument at 16.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(
            f"the numbers of system calls are known for {' and '.join(ARCHITECTURES)}, this is {machine}"
        )
    architecture, column = ARCHITECTURES[machine]
    load, if_equal, if_at_least, if_any, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS, 0x80000000

    # (operation, skip if true, skip if false, operand)
    steps = [(load, 0, 0, 4), (if_equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    steps += [
        (if_at_least, 0, 1, 0x40000000),
        (answer, 0, 0, kill),
    ]  # x86-64's second table of the same calls
    steps += [
        (if_equal, 0, 1, CLONE3),
        (answer, 0, 0, absent),
    ]  # its flags lie in memory; libraries fall back to clone
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            steps += [(if_equal, 0, 1, numbers[column]), (answer, 0, 0, refuse)]
    steps += [
        (if_equal, 0, 3, CLONE[column]),
        (load, 0, 0, 16),
        (if_any, 1, 0, THREAD),
        (answer, 0, 0, refuse),
    ]
    steps += [(answer, 0, 0, allow)]

    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", SET_SECCOMP, SECCOMP_FILTER, program)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )


def call(name: str, *arguments: int | bytes | ctypes.c_ulong | None) -> None:
    if getattr(LIBC, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    source, report, function, seconds, memory_mb = sys.argv[1:]
    try:
        status = enter(int(source), int(report), function, int(seconds), int(memory_mb))
    except OSError as error:
        os.write(int(report), str(error).encode())
        status = 1
    os._exit(status)
