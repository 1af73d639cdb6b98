"""Intel's Advanced Matrix Extensions: whether this process may use them, which Linux grants on request."""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import platform
import sys

from pallas_kernels.cpu_ffi.compiled import processor

logger = logging.getLogger("pallas_kernels")

#: of Linux on x86-64: arch_prctl's number, its request for a state component, and the one of tiles' numbers
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18
#: features of a processor, by the numbers of tiles
_NEEDED = {"bfloat16": {"amx-bf16", "avx512bf16"}, "int8": {"amx-int8"}}


def is_usable(numbers: str = "bfloat16") -> bool:
    """Whether this processor multiplies tiles of such numbers, "bfloat16" or "int8", and this process may use them.
    What tiles of bfloat16 give is rounded in vectors, for which a virtual machine may lack the instruction.
    """
    return _NEEDED[numbers] <= processor()[1] and _is_permitted()


@functools.cache
def _is_permitted() -> bool:
    """Ask for this process's permission to use tiles, in all of its threads and for good; whether it has it. The log
    says why not.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype, call.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    if call(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0:
        return True
    error = ctypes.get_errno()
    small = error == errno.ENOSPC  # whose text is about disks
    why = "a thread's alternate stack for signals is too small for tiles" if small else os.strerror(error)
    logger.warning(
        "Products on this processor are slower than they could be: Linux lets this process not use AMX (%s)", why
    )
    return False
