"""Memory that the C library keeps, instead of giving it back to the system after each step and
asking for it again.

On a CPU the activations of a step are one block of some GB, which the system would hand out anew
each time, page by page and zeroed: a fifth of the time of a BERT-base step. Imports nothing that
takes long, since it must come before JAX.
"""

import ctypes
import glob
import os
import sys

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # malloc.h of glibc
_ACCELERATORS = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')


def keep() -> bool:
  """Has this process keep what it frees, where it will compute on a CPU and its C library is glibc.

  To be called before JAX's first array: each of its threads takes the settings that hold then.

  Returns:
    Whether memory is kept.
  """
  cpu = os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, _ACCELERATORS))
  libc = ctypes.CDLL(None) if cpu and sys.platform == 'linux' else None
  if not hasattr(libc, 'gnu_get_libc_version'):
    return False
  options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
  return all(libc.mallopt(*option) for option in options)
