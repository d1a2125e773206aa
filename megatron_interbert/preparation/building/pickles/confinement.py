"""Take away from a process what decoding does not need: files, network, programs, unlimited memory.

Resource limits work on every Unix. On Linux (x86_64 and aarch64), seccomp also refuses all system
calls except a few; if it cannot be set up, only the limits hold.
"""

import contextlib
import ctypes
import errno
import platform
import resource
import struct
import sys

# machine -> its AUDIT_ARCH number, and its allowed system calls: memory, read, write, time, exit
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigaction": 13,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "mremap": 25,
            "madvise": 28,
            "alarm": 37,
            "setitimer": 38,
            "exit": 60,
            "gettimeofday": 96,
            "sigaltstack": 131,
            "futex": 202,
            "restart_syscall": 219,
            "clock_gettime": 228,
            "exit_group": 231,
            "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "read": 63,
            "write": 64,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "setitimer": 103,
            "clock_gettime": 113,
            "restart_syscall": 128,
            "sigaltstack": 132,
            "rt_sigaction": 134,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "gettimeofday": 169,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
            "getrandom": 278,
        },
    ),
}
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
# instructions of the filter (classic BPF)
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
RETURN = 0x06
# offsets in struct seccomp_data, which describes a system call
NUMBER_AT = 0
MACHINE_AT = 4
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM


def confine(memory: int) -> bool:
    """Confine this process for good to `memory` bytes of address space, without new files or
    sockets; return whether system calls are filtered too.
    """
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        with contextlib.suppress(OSError, ValueError):  # a system may lack one of them
            resource.setrlimit(kind, (limit, limit))

    return filter_system_calls()


def filter_system_calls() -> bool:
    """Refuse all system calls except those in MACHINES with EPERM; return False if that cannot be
    done.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES:
        return False

    if sys.maxsize < 1 << 32:  # 32-bit Python on a 64-bit kernel has other call numbers
        return False

    code = filter_program(*MACHINES[platform.machine()])
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(instructions))

    call = ctypes.CDLL(None).prctl
    call.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    whole = ctypes.create_string_buffer(program, len(program))
    if call(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False

    return call(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(whole), 0, 0) == 0


def filter_program(machine: int, calls: dict[str, int]) -> bytes:
    """Build the kernel's filter: it allows only the listed system calls of the given machine."""
    count = len(calls)
    steps = [
        (LOAD, 0, 0, MACHINE_AT),
        (JUMP_IF_EQUAL, 0, count + 1, machine),  # else to REFUSE
        (LOAD, 0, 0, NUMBER_AT),
    ]
    for index, number in enumerate(calls.values()):
        steps.append((JUMP_IF_EQUAL, count - index, 0, number))  # to ALLOW, else on

    steps.append((RETURN, 0, 0, REFUSE))
    steps.append((RETURN, 0, 0, ALLOW))

    return b"".join(struct.pack("HBBI", *step) for step in steps)
