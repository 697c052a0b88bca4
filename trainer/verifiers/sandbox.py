"""The process of a program that nobody has read: `python -I sandbox.py FILE_DESCRIPTOR`, started by code.py.

It gives up what the program must not have, then runs it. What the kernel does not offer is left out; an
ordinary Linux of our days offers all of it, with or without root, and on macOS the limits remain.

- It sees no variables, reads its input, and has limits for memory, for open files and for their size.
- It starts threads (memory bounds them), but no process, opens no socket, signals only itself (seccomp).
- It writes only to its own empty folder, and looks into no other process (Landlock).
- It ends with its parent, whose time is limited.

Asserts run in the program's own process. Exiting early, printing and catching errors gain nothing, because
the verdict needs a token that is written after the tests. A program that searches the frames of this file
finds the token, and one that returns an object equal to everything passes: tests by input and output have no
such holes.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types

_FILE_BYTES = 16 << 20  # of the output and of each file that is written
_OPEN_FILES = 64
_NOT_CONFINED = 99  # exit code, also in code.py
_LIBC = ctypes.CDLL(None)
_SET_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38  # of prctl

# Landlock: bits of access to files. The ones from 13 on came with later versions of its interface.
_WRITE, _REMOVE_AND_MAKE, _LINK, _TRUNCATE = 1 << 1, 0x1FF << 4, 1 << 13, 1 << 14
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

# Instructions of a seccomp filter (linux/bpf_common.h), and what it answers.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL = (_RETURN, 0, 0, 0x7FFF0000), (_RETURN, 0, 0, 0x80000000)
_REFUSE, _UNKNOWN = (_RETURN, 0, 0, 0x50000 | 1), (_RETURN, 0, 0, 0x50000 | 38)  # EPERM, ENOSYS
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of system calls on both; -1 = there is no such call.
_CLONE, _CLONE3, _KILL_PROCESS, _KILL_THREAD = (56, 220), (435, 435), (62, 129), (234, 131)
_REFUSED = [
    *((57, -1), (58, -1), (59, 221), (322, 281)),  # fork, vfork, execve, execveat
    *((41, 198), (425, 425)),  # socket, io_uring_setup
    *((112, 157), (109, 154)),  # setsid, setpgid: they would leave the group that is killed
    *((200, 130), (129, 138), (297, 240), (424, 424)),  # tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd
    *((101, 117), (310, 270), (311, 271)),  # ptrace, process_vm_readv, process_vm_writev
]


def main() -> None:
    """Read the task, give up everything else, and run it."""
    with open(int(sys.argv.pop())) as file:
        task = json.load(file)
    try:
        _confine(task["memory_mb"])
    except (OSError, OverflowError, ValueError):
        os._exit(_NOT_CONFINED)
    if "tests" in task:
        _run_with_tests(task)
    else:
        _execute(task["program"], "__main__")


def _execute(program: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, "program.py", "exec"), module.__dict__)
    return module


def _run_with_tests(task: dict) -> None:
    """Write the token, the number of tests passed and the first error, once the tests are over."""
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    execute, write = builtins.exec, os.write  # as they were before the program could replace them
    tests = [(compile(source, "tests", "exec"), counts) for source, counts in task["tests"]]
    passed, reason = 0, ""
    try:
        module = _execute(task["program"], "program")
        for code, counts in tests:
            try:
                execute(code, module.__dict__)
                passed += counts
            except BaseException as error:
                reason = reason or _line(error)
                if not counts:  # the tests that follow need it
                    break
    except BaseException as error:
        reason = _line(error)
    write(verdict, f"{task['token']} {passed} {reason}".encode())
    os._exit(0)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}"[:200].split())


def _confine(memory_mb: int) -> None:
    """From here on, this process can do what the head of the file says, and never more."""
    limits = {resource.RLIMIT_AS: memory_mb << 20, resource.RLIMIT_FSIZE: _FILE_BYTES}
    limits |= {resource.RLIMIT_NOFILE: _OPEN_FILES, resource.RLIMIT_CORE: 0}
    if not (sys.platform == "linux" and _confine_by_kernel()):
        limits[resource.RLIMIT_NPROC] = 0  # no threads either, then
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _confine_by_kernel() -> bool:
    """Landlock, no rights of root, seccomp; whether the last is in force."""
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _LIBC.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _write_only_here()
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _LIBC.capset(header, none)
    filter_ = _filter(platform.machine())
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in filter_)
    buffer = ctypes.create_string_buffer(instructions)
    program = struct.pack("HP", len(filter_), ctypes.addressof(buffer))
    return bool(filter_) and _LIBC.prctl(_SET_SECCOMP, 2, program, 0, 0) == 0


def _write_only_here() -> None:
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return
    access = _WRITE | _REMOVE_AND_MAKE | (_LINK if version > 1 else 0) | (_TRUNCATE if version > 2 else 0)
    rules = _LIBC.syscall(_CREATE_RULESET, struct.pack("Q", access), ctypes.c_size_t(8), 0)
    for path, allowed in ((".", access), (os.devnull, access & (_WRITE | _TRUNCATE))):
        beneath = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        _LIBC.syscall(_ADD_RULE, rules, _PATH_BENEATH, beneath, 0)
    _LIBC.syscall(_RESTRICT_SELF, rules, 0)
    os.closerange(3, _OPEN_FILES)


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The instructions (code, jump if true, jump if false, value) for a machine; none for an unknown one."""
    if machine not in _ARCHITECTURES:
        return []
    column = list(_ARCHITECTURES).index(machine)

    def when(call: tuple[int, int], *then: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, len(then), call[column]), *then] if call[column] >= 0 else []

    first, ourselves = (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, os.getpid())
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        _KILL,
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # the calls of x86_64 by other numbers
        _REFUSE,
        *(instruction for call in _REFUSED for instruction in when(call, _REFUSE)),
        *when(_CLONE, first, (_ANY_BIT, 1, 0, _CLONE_THREAD), _REFUSE, _ALLOW),
        *when(_CLONE3, _UNKNOWN),  # its flags lie in memory; libc then takes clone
        *when(_KILL_PROCESS, first, ourselves, _REFUSE, _ALLOW),
        *when(_KILL_THREAD, first, ourselves, _REFUSE, _ALLOW),
        _ALLOW,
    ]


if __name__ == "__main__":
    main()
