"""Large blocks of memory on a CPU: in huge pages, and kept from one step to the next.

The activations of a step are one block of some GB. By itself the C library gives it back after each
step and asks for it again, and the system hands it out anew, zeroed: page by page that takes a
fifth of the time of a BERT-base step, in pages of 2 MiB little, unless the machine is virtual and
its host has to be asked too. So it is kept, while steps are taken (`Kept`). For that one step has
to be over before the next is dispatched, as JAX else takes the block of the next one while the last
one's is in use, and both would be kept. Before an evaluation or a save, whose copies would stand
beside it, it is given back, and its addresses stay reserved until steps go on: were they taken for
a while, the next step would look for others, the one after that find the first again, and both
would be kept. Once the block is there, the system is asked for no more huge pages: it would go on
to fill up those of which only a small block is in use, minute by minute, and a run would seem to
leak. glibc and JAX read what they are to do from the environment
(`set_up`). Imports nothing that takes long, since it must come before JAX.
"""

import ctypes
import glob
import os
import pathlib
import re
import sys
import time

# glibc's manual, "Memory Allocation Tunables": huge pages by madvise; blocks from 1 MiB on are
# given back when they are freed, and threads share one store of smaller ones.
TUNABLES = {'hugetlb': '1', 'mmap_threshold': str(2**20), 'arena_max': '1'}
_VARIABLE, _HUGE_PAGES = 'GLIBC_TUNABLES', '/sys/kernel/mm/transparent_hugepage/enabled'
_ASYNCHRONOUS = 'JAX_CPU_ENABLE_ASYNC_DISPATCH'
ROOM = 2**26  # bytes for small blocks beside that of a step
LONGEST, PAUSE = 1.0, 1e-4  # seconds to wait for that of a step, and between two looks
WARM = 3  # steps, of which each may take memory that it goes on with
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_DROP, _HUGE, _NOT_HUGE = 4, 14, 15  # advice of Linux's mman.h
_HUGE_PAGE = 2**21  # bytes
_ACCELERATORS = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')


def set_up() -> None:
  """Starts this very process anew with glibc's settings for huge pages and JAX's for one step after
  the other, where it will compute on a CPU and they are not set; returns where that is not possible
  or not needed.

  To be called before anything else, by a program whose process is its own.
  """
  settings = _settings(os.environ)
  if settings is not None and _possible():
    environment = {_ASYNCHRONOUS: '0'} | os.environ | {_VARIABLE: settings}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


class Kept:
  """From now on what is freed stays with this process, where `set_up` has prepared it.

  Args:
    block: bytes of the block of a step.

  Attributes:
    active: whether it stays; where not, nothing is waited for.
    limit: bytes in use, by the C library's count, above which the last step's block is still there.
  """

  def __init__(self, block: int):
    prepared = 'glibc.malloc.hugetlb=1' in os.environ.get(_VARIABLE, '')
    self.active = prepared and os.environ.get(_ASYNCHRONOUS) == '0' and _possible()
    if self.active:
      self.libc = _c_library()
      self.libc.mallopt(_M_MMAP_MAX, 0)
      self.libc.mallopt(_M_TRIM_THRESHOLD, -1)
      # Small blocks look for the smallest hole: first that of the room.
      self.size = block + 2 * ROOM
      self.end, self.limit = None, self._in_use() + ROOM
      self.reserved = self.libc.malloc(self.size)
    self.renew()

  def pause(self) -> None:
    """Gives back the block of the last step, and lets nothing else take its addresses: before an
    evaluation or a save.
    """
    if self.active:
      self.wait()
      self.reserved = self.libc.malloc(self.size)
    if self.active and self.reserved:  # a system may refuse so much
      first = -(-self.reserved // _HUGE_PAGE) * _HUGE_PAGE
      last = (self.reserved + self.size) // _HUGE_PAGE * _HUGE_PAGE
      self.libc.madvise(first, last - first, _DROP)
    release()

  def renew(self) -> None:
    """Gives back what is not used, and makes room for a step's block and small ones anew: after an
    evaluation or a save, whose small blocks may have filled it.
    """
    release()
    if self.active:
      self.libc.free(self.end)
      self.end = _make_room(self.libc)
      self.libc.free(self.reserved)
      self.reserved = None
      release()  # each block of the room has taken a huge page, by a word at its beginning
      self._settle()
      self.limit = self._in_use() + ROOM
      self.waits = 0
      self._advise(_HUGE)

  def wait(self) -> None:
    """Waits until the block of the last step is free: some microseconds after its results are
    there, or later where other programs want the processors. A step that is dispatched before would
    take another block beside it.
    """
    if not self.active:
      return
    self.waits += 1
    if self.waits == WARM + 1:
      self._advise(_NOT_HUGE)
    self._settle()

  def _settle(self) -> None:
    looks = int(LONGEST / PAUSE)  # not by a clock, which goes on while this process does not
    while self._in_use() > self.limit:
      looks -= 1
      if looks < 0:  # it is something else that has come to stay
        self.limit = self._in_use() + ROOM
      time.sleep(PAUSE)

  def _in_use(self) -> int:
    return self.libc.mallinfo2().uordblks

  def _advise(self, advice: int) -> None:
    """For what the C library holds; pages that are there stay as they are."""
    maps = pathlib.Path('/proc/self/maps').read_text().splitlines()
    heap = [line.split()[0].split('-') for line in maps if line.endswith('[heap]')]
    if heap:
      start, stop = int(heap[0][0], 16), int(heap[-1][1], 16)
      self.libc.madvise(start, stop - start, advice)


def _c_library() -> ctypes.CDLL:
  libc = ctypes.CDLL(None)
  libc.mallinfo2.restype = _Mallinfo
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  return libc


class _Mallinfo(ctypes.Structure):
  """`struct mallinfo2` of glibc's malloc.h."""

  _fields_ = [
    (name, ctypes.c_size_t)
    for name in (
      *('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd'),
      *('usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost'),
    )
  ]


def _make_room(libc: ctypes.CDLL) -> int:
  """Leaves a hole for smaller blocks, and returns the block at its end. The C library puts a block
  into the smallest hole that holds it: were there none but that of a step's block, the next step's
  would no longer fit there.
  """
  room, ends = libc.malloc(ROOM), [libc.malloc(2**20)]
  while ends[-1] < room:  # one that lies behind it, so that it stays a hole of its own
    ends.append(libc.malloc(2**20))
  for block in (room, *ends[:-1]):
    libc.free(block)
  return ends[-1]


def release() -> None:
  """Gives back to the system what the C library keeps and does not use."""
  libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
  if hasattr(libc, 'malloc_trim'):
    libc.malloc_trim(0)


def held(field: str) -> int | None:
  """Bytes of this process: `VmRSS` now, `VmHWM` at most so far; None where there is no /proc."""
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return None
  found = re.search(rf'^{field}:\s+(\d+) kB', status.read_text(), re.MULTILINE)
  return int(found[1]) * 1024 if found else None


def _settings(environment: dict[str, str] | os._Environ[str]) -> str | None:
  """The value of the variable with our settings added to the user's; None where it has been set for
  huge pages already, or another device is computed on.
  """
  given = environment.get(_VARIABLE, '')
  cpu = environment.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, _ACCELERATORS))
  if not cpu or 'glibc.malloc.hugetlb' in given:
    return None
  ours = [
    f'glibc.malloc.{name}={value}'
    for name, value in TUNABLES.items()
    if f'glibc.malloc.{name}=' not in given
  ]
  return ':'.join(filter(None, [given, *ours]))


def _possible() -> bool:
  """Whether the system has huge pages for those who ask, and the C library asks."""
  pages = pathlib.Path(_HUGE_PAGES)
  if sys.platform != 'linux' or not pages.exists() or '[madvise]' not in pages.read_text():
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'gnu_get_libc_version'):
    return False
  libc.gnu_get_libc_version.restype = ctypes.c_char_p
  found = re.match(r'(\d+)\.(\d+)', libc.gnu_get_libc_version().decode())
  return found is not None and tuple(map(int, found.groups())) >= (2, 35)
