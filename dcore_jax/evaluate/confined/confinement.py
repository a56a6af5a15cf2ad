"""Takes from a process, for the rest of its life, what judging an answer does not need.

Three layers, of which the kernel keeps the first two whatever runs in the process:

- A seccomp filter: system calls that are not on a list fail. Not on it are new processes and
  threads, programs, sockets, signals, and every way to make, change or remove a file; files open
  for reading alone.
- Limits: memory, processor time, open files, bytes written to files (none).
- An audit hook: of files, only those of Python's standard library open. Code that knows Python
  well may get around it, and read what this user can read; it has nobody to tell, since all that
  leaves the process is compared with a reference.

Linux on x86-64 or arm64; elsewhere `problem` says that there is no filter, and the hook stands
alone. `harness` is for programs of others, which need more than that.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence
from typing import Any

_ERRNO = 0x00050001  # SECCOMP_RET_ERRNO with EPERM
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
# Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _THIRD_ARGUMENT = 0, 4, 32
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What begins the names of Python's audit events of programs, and of files that move or go.
PROGRAMS = (
  'subprocess.',
  'shutil.',
  'os.exec',
  'os.fork',
  'os.posix_spawn',
  'os.system',
  'os.remove',
  'os.rename',
  'os.rmdir',
)
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2

# What reading, computing, sleeping and ending need, as numbers by name. fcntl and ioctl are not
# among them: they can send signals, or type into a terminal.
_X86_64 = {
  'read': 0,
  'write': 1,
  'close': 3,
  'stat': 4,
  'fstat': 5,
  'lstat': 6,
  'poll': 7,
  'lseek': 8,
  'mmap': 9,
  'mprotect': 10,
  'munmap': 11,
  'brk': 12,
  'rt_sigaction': 13,
  'rt_sigprocmask': 14,
  'rt_sigreturn': 15,
  'pread64': 17,
  'readv': 19,
  'writev': 20,
  'access': 21,
  'select': 23,
  'sched_yield': 24,
  'mremap': 25,
  'madvise': 28,
  'dup': 32,
  'nanosleep': 35,
  'getpid': 39,
  'exit': 60,
  'uname': 63,
  'getcwd': 79,
  'readlink': 89,
  'gettimeofday': 96,
  'getrusage': 98,
  'sysinfo': 99,
  'times': 100,
  'getuid': 102,
  'getgid': 104,
  'geteuid': 107,
  'getegid': 108,
  'getppid': 110,
  'sigaltstack': 131,
  'gettid': 186,
  'futex': 202,
  'sched_getaffinity': 204,
  'getdents64': 217,
  'clock_gettime': 228,
  'clock_getres': 229,
  'clock_nanosleep': 230,
  'exit_group': 231,
  'openat': 257,
  'newfstatat': 262,
  'readlinkat': 267,
  'faccessat': 269,
  'pselect6': 270,
  'ppoll': 271,
  'getrandom': 318,
  'statx': 332,
  'rseq': 334,
  'faccessat2': 439,
}
_ARM64 = {
  'getcwd': 17,
  'dup': 23,
  'faccessat': 48,
  'openat': 56,
  'close': 57,
  'getdents64': 61,
  'lseek': 62,
  'read': 63,
  'write': 64,
  'readv': 65,
  'writev': 66,
  'pread64': 67,
  'pselect6': 72,
  'ppoll': 73,
  'readlinkat': 78,
  'newfstatat': 79,
  'fstat': 80,
  'exit': 93,
  'exit_group': 94,
  'futex': 98,
  'nanosleep': 101,
  'clock_gettime': 113,
  'clock_getres': 114,
  'clock_nanosleep': 115,
  'sched_getaffinity': 123,
  'sched_yield': 124,
  'sigaltstack': 132,
  'rt_sigaction': 134,
  'rt_sigprocmask': 135,
  'rt_sigreturn': 139,
  'times': 153,
  'uname': 160,
  'getrusage': 165,
  'gettimeofday': 169,
  'getpid': 172,
  'getppid': 173,
  'getuid': 174,
  'geteuid': 175,
  'getgid': 176,
  'getegid': 177,
  'gettid': 178,
  'sysinfo': 179,
  'brk': 214,
  'munmap': 215,
  'mremap': 216,
  'mmap': 222,
  'mprotect': 226,
  'madvise': 233,
  'getrandom': 278,
  'statx': 291,
  'rseq': 293,
  'faccessat2': 439,
}
# Machine -> (AUDIT_ARCH, numbers of calls).
_MACHINES = {'x86_64': (0xC000003E, _X86_64), 'aarch64': (0xC00000B7, _ARM64)}


class _Program(ctypes.Structure):
  """struct sock_fprog."""

  _fields_ = [('length', ctypes.c_ushort), ('instructions', ctypes.c_char_p)]


def problem() -> str:
  """Returns why a process cannot be confined here; '' where it can."""
  if sys.platform != 'linux' or platform.machine() not in _MACHINES:
    return f'needs Linux on {" or ".join(_MACHINES)}: answers are run under its seccomp filter'
  if not os.path.exists('/proc/sys/kernel/seccomp/actions_avail'):
    return 'needs a kernel with seccomp filters: answers are run under one'
  return ''


def confine(*, seconds: int, memory: int, folders: Sequence[str] = ()) -> None:
  """Confines this process. What it needs of files beside the standard library is read before.

  Where `problem` says that there is no filter, the hook stands alone.

  Args:
    seconds: of processor time, from its start, after which the kernel ends it.
    memory: bytes of its address space.
    folders: of further files that may be read, for modules that are imported later.

  Raises:
    OSError: the kernel refuses the filter.
  """
  kept = (os.path.dirname(os.__file__) + os.sep, *(folder + os.sep for folder in folders))
  if not problem():
    for limit, value in (
      (resource.RLIMIT_CPU, seconds),
      (resource.RLIMIT_AS, memory),
      (resource.RLIMIT_FSIZE, 0),
      (resource.RLIMIT_CORE, 0),
      (resource.RLIMIT_NOFILE, 64),
      (resource.RLIMIT_NPROC, 0),
    ):
      # The hard limit as well: a soft one could be raised again, or its signal caught.
      resource.setrlimit(limit, (value, value))
    _install(_filter())

  def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ('open', 'os.listdir', 'os.scandir'):
      path = arguments[0]
      if not (isinstance(path, str) and path.startswith(kept) and '..' not in path):
        raise PermissionError('files of the standard library alone can be opened here')
      if event == 'open' and (arguments[2] or 0) & WRITES:
        raise PermissionError('open for writing is not allowed here')
    elif event.startswith((*PROGRAMS, 'socket.', 'ctypes.')):
      raise PermissionError(f'{event} is not allowed here')

  # A hook stays for the life of the process.
  sys.addaudithook(refuse)
  for name in ('ctypes', '_ctypes', 'ctypes._endian'):
    sys.modules.pop(name, None)


def _filter() -> bytes:
  """Returns the filter as instructions of the kernel's packet filter."""
  architecture, numbers = _MACHINES[platform.machine()]
  # (code, jump if true, jump if false, value); jumps count the instructions that are left out.
  steps = [
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_EQUAL, 1, 0, architecture),
    # Calls of another architecture have other numbers.
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, _NUMBER),
    (_EQUAL, 0, 4, numbers['openat']),
    (_LOAD, 0, 0, _THIRD_ARGUMENT),
    (_ANY_BIT, 0, 1, WRITES),
    (_RETURN, 0, 0, _ERRNO),
    (_RETURN, 0, 0, _ALLOW),
  ]
  for name, number in numbers.items():
    if name != 'openat':
      steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
  steps.append((_RETURN, 0, 0, _ERRNO))
  return b''.join(struct.pack('HBBI', *step) for step in steps)


def _install(instructions: bytes) -> None:
  library = ctypes.CDLL(None, use_errno=True)
  call = library.prctl
  call.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
  program = _Program(len(instructions) // 8, instructions)
  # Without new privileges any user may filter itself.
  if call(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or call(
    _SET_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0
  ):
    raise OSError(ctypes.get_errno(), 'the kernel takes no seccomp filter')
