r"""The sandbox: run one Python program in a process that has given up all rights beforehand.

grading/sandbox.py starts this module for each run, as a new program, so that it shares no threads,
open files or memory with the trainer. It becomes three processes. If one is killed, the kernel
ends those to its right:

    sandbox.py ──▶ sandbox_child.py ──────▶ process 1 of a pid namespace ──▶ the program
                   makes the namespaces     makes the root directory         gives up all rights,
                   and waits                and waits; when it ends,         then becomes
                                            the namespace ends               python -c DRIVER

| step | what it takes away |
|---|---|
| namespaces: mount, pid, net, ipc, uts | the machine's files, processes, network and host name |
| a root directory of its own | all files but those that Python needs, read-only; /proc, /sys |
| a user id that nobody has | the files of others, and rights over the namespaces |
| no capabilities, and no way to get any | set-user-id programs |
| limits | address space, processor time, sizes of files, open files, threads |
| a filter on system calls | more processes, memory outside the address space, parts of the kernel |

An ordinary user first makes a user namespace, which gives the right to make the others. Root needs
none, and the program cannot make one. If any step fails, the sandbox reports it and ends before the
program starts. This module must not import any other of this project: it runs with `-I -S`.
"""

import _signal as signal  # the same without its enums, whose import takes 5 ms of every run
import ctypes
import os
import resource
import struct
import sys

MIB = 1 << 20
MAX_FILE = 64 * MIB  # bytes of /tmp, and of the largest file
# Recursion through C, as with functools.cache, takes more than the usual 8 MiB. Each thread
# reserves as much.
STACK = 64 * MIB
MAX_THREADS = 32
MAX_OPEN_FILES = 64

# What solutions expect, as in LiveCodeBench's checker: all names of these modules, then the modules
# themselves, in this order, so that `bisect`, `copy` and `datetime` are the modules. The builtins
# replace other functions of their names, such as the pow of math, which has no modulus.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json"
).split()
PRELUDE = "\n".join(
    [f"from {module} import *" for module in [*MODULES, "builtins", "typing"]]
    + [f"import {module}" for module in MODULES]
    + ["exit = quit = sys.exit", "sys.setrecursionlimit(50_000)"]
)
MAX_DIGITS = 50_000  # of an integer that is read or printed; Python's own limit is 4,300

# What Python runs in the sandbox. Its arguments are the descriptor of the source file and the name
# of the function to call, or "". The result of a function goes to a copy of stdout, and what the
# program prints goes to stderr, so that no printed text can be taken for the result. As in
# LiveCodeBench's checker, a program that prints may end with any status of sys.exit. Garbage
# collection during the imports would cost 2 ms.
DRIVER = f"""
import gc
import sys
gc.disable()
sys.set_int_max_str_digits({MAX_DIGITS})
with open(int(sys.argv[1]), "rb") as file:
    source = file.read()
name = sys.argv[2]
del sys.argv[1:]  # the program itself has no arguments
if name:
    import json
    import os
    arguments = [json.loads(line) for line in sys.stdin if line.strip()]
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
space = {{"__name__": "solution" if name else "__main__"}}
exec({PRELUDE!r}, space)
gc.enable()
space.pop(name, None)  # the function must be the program's own
code = compile(source, "program.py", "exec")
if name:
    exec(code, space)
    function = getattr(space["Solution"](), name) if "Solution" in space else space[name]
    result.write(json.dumps(function(*arguments)))
    result.close()
else:
    try:
        exec(code, space)
    except SystemExit:
        pass
"""

# Numbers of the kernel's interface, from <linux/sched.h>, <linux/mount.h>, <linux/fcntl.h> and
# <linux/prctl.h>.
NEW_MOUNT = 1 << 17
NEW_UTS = 1 << 26
NEW_IPC = 1 << 27
NEW_USER = 1 << 28
NEW_PID = 1 << 29
NEW_NET = 1 << 30
NAMESPACES = NEW_MOUNT | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
NOSUID, NODEV, BIND = 2, 4, 1 << 12
RECURSIVE, PRIVATE, DETACH = 1 << 14, 1 << 18, 2
MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID = 1, 2
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_FILTER = 2
EPERM, ENOSYS = 1, 38

# Machine → (its number in <linux/audit.h>, column in the table below).
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# System calls that are refused, with their numbers on x86-64 and ARM64: further processes; memory
# that belongs to no address space; sockets, some of whose families have no namespaces; keys,
# tracing, the kernel's log, and interfaces with a record of security holes.
REFUSED = {
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "syslog": (103, 116),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
CLONE = (56, 220)
CLONE3 = 435
CLONE_THREAD = 1 << 16

# Operations and answers of a seccomp filter, from <linux/bpf_common.h> and <linux/seccomp.h>.
LOAD, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | EPERM
ABSENT = 0x00050000 | ENOSYS
KILL = 0x80000000

LIBC = ctypes.CDLL(None, use_errno=True)


def enter(source: int, report: int, function: str, seconds: int, memory_mb: int) -> int:
    """Run the program in the file `source`; returns its exit status, or 128 + the signal that
    ended it.

    `function` is the function to call, "" for none; `report` is a descriptor for errors of this
    script. Two of the three processes return from here, the program's never does. Raises OSError.
    """
    # It is closed when the program starts, so what is reported comes from this script.
    os.set_inheritable(report, False)
    call("prctl", SET_PDEATHSIG, signal.SIGKILL)
    write("/proc/self/oom_score_adj", "1000")  # if memory runs out, kill this, not the trainer
    os.umask(0o022)  # the program is another user, and must see the folders made here
    user, group = make_namespaces()
    first = os.fork()
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        return wait(first)
    call("prctl", SET_PDEATHSIG, signal.SIGKILL)
    # Ends the namespace if the processes outside have died before SET_PDEATHSIG was in effect.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
    signal.alarm(seconds + 5)
    make_root()
    call("sethostname", b"box", 3)
    program = os.fork()
    if program:
        return wait(program)
    give_up_rights(user, group)
    set_limits(seconds, memory_mb * MIB)
    filter_calls()
    arguments = [sys.executable, "-S", "-s", "-P", "-B", "-c", DRIVER, str(source), function]
    # No locale is set, so text is UTF-8. The hash seed makes the order of a set, and so the
    # verdict, the same in each run.
    os.execve(sys.executable, arguments, {"HOME": "/tmp", "PYTHONHASHSEED": "0"})


def make_namespaces() -> tuple[int, int]:
    """Enter new namespaces; returns the user and the group that the program will run as."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call("unshare", NAMESPACES)
        # A user that owns nothing, and nearly always one that no other sandbox has: systemd's range
        # for transient users.
        transient = 61184 + os.getpid() % 4336
        return transient, transient
    call("unshare", NAMESPACES | NEW_USER)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")
    return user, group


def give_up_rights(user: int, group: int) -> None:
    """Become this user and group, without capabilities. An ordinary user loses those at execve."""
    if os.geteuid() != 0:
        return
    call("setgroups", 0, None)
    call("setresgid", group, group, group)
    call("setresuid", user, user, user)


def wait(process: int) -> int:
    """The exit status of a child process, or 128 + the signal that ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def make_root() -> None:
    """Move to a root directory that has only the files that Python needs. All of it but /tmp is
    read-only, whoever owns the files outside."""
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    wanted += [sys.executable, f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    wanted += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    sources = {path: os.path.realpath(path) for path in sorted(wanted) if os.path.exists(path)}

    mount("none", "/", "", RECURSIVE | PRIVATE)  # otherwise these mounts would show outside
    mount("box", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    call("pivot_root", b".", b"old")
    os.chdir("/")
    for path, source in sources.items():
        if os.path.exists(path):
            continue  # it is in a folder that is already mounted
        if os.path.isdir("/old" + source):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(path, "")
        mount("/old" + source, path, "", BIND | RECURSIVE)
    copy_stdin("/dev/stdin")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    os.makedirs("/tmp", exist_ok=True)
    make_read_only()
    mount("box", "/tmp", "tmpfs", NOSUID | NODEV, f"size={MAX_FILE},nr_inodes=4096,mode=1777")
    os.chdir("/tmp")


def copy_stdin(path: str) -> None:
    """Write all of stdin to a new file, for programs that open it by name. Their stdin itself stays
    at its beginning. (Elsewhere this name is a link into /proc, which does not exist here.)"""
    size, copied = os.fstat(0).st_size, 0
    with open(path, "wb") as file:
        while copied < size:
            copied += os.sendfile(file.fileno(), 0, copied, size - copied)


def make_read_only() -> None:
    """Make everything that is mounted now read-only, and ignore set-user-id bits."""
    # struct mount_attr: attributes to set, to clear, propagation, user namespace
    attributes = struct.pack("4Q", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size)


def set_limits(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        # Of all threads together. The time limit itself is the caller's clock.
        resource.RLIMIT_CPU: seconds + 1,
        resource.RLIMIT_FSIZE: MAX_FILE,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        # Counted by user and user namespace, so for this sandbox alone.
        resource.RLIMIT_NPROC: MAX_THREADS,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))


def filter_calls() -> None:
    """From here on the calls in `REFUSED` fail with EPERM, and clone makes threads only. This
    cannot be undone. Raises OSError on a machine whose call numbers are not known."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise OSError(f"the numbers of system calls are known for {known}, this is {machine}")
    steps = filter_steps(*ARCHITECTURES[machine])
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", SET_SECCOMP, SECCOMP_FILTER, program)


def filter_steps(architecture: int, column: int) -> list[tuple[int, int, int, int]]:
    """The filter as a program of classic BPF; a step is (operation, steps to skip if true, steps to
    skip if false, operand).

    The kernel runs it before every system call. Its input is struct seccomp_data: the number of the
    call at byte 0, the architecture at byte 4, the low half of the first argument at byte 16.
    """
    steps = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, architecture), (ANSWER, 0, 0, KILL)]
    steps += [(LOAD, 0, 0, 0)]
    # x86-64 has a second table of the same calls, from this number on.
    steps += [(IF_AT_LEAST, 0, 1, 0x40000000), (ANSWER, 0, 0, KILL)]
    # The flags of clone3 are in memory, where a filter cannot see them. Libraries then use clone.
    steps += [(IF_EQUAL, 0, 1, CLONE3), (ANSWER, 0, 0, ABSENT)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            steps += [(IF_EQUAL, 0, 1, numbers[column]), (ANSWER, 0, 0, REFUSE)]
    steps += [(IF_EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, 16)]
    steps += [(IF_ANY_BIT, 1, 0, CLONE_THREAD), (ANSWER, 0, 0, REFUSE)]
    steps += [(ANSWER, 0, 0, ALLOW)]
    return steps


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    names = (source.encode(), target.encode(), kind.encode())
    call("mount", *names, ctypes.c_ulong(flags), options.encode())


def call(name: str, *arguments: int | bytes | ctypes.c_ulong | None) -> None:
    """Call a function of the C library. Raises OSError if it fails."""
    if getattr(LIBC, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main(arguments: list[str]) -> None:
    source, report, function, seconds, memory_mb = arguments
    try:
        status = enter(int(source), int(report), function, int(seconds), int(memory_mb))
    except OSError as error:
        os.write(int(report), str(error).encode())
        status = 1
    os._exit(status)
