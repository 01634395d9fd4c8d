"""How JAX is set up: memory on a CPU."""

import ctypes
import subprocess
import sys

import pytest

# A heap of 3 GiB, none of which is touched: sbrk says where it ends.
FREE_3_GIB = """
import ctypes
from llama_jax.devices.memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes, libc.sbrk.restype = [ctypes.c_void_p], ctypes.c_void_p
start = libc.sbrk(0)
block = libc.malloc(3 << 30)
end = libc.sbrk(0)
assert block and end - start >= 3 << 30
libc.free(block)
print(end - libc.sbrk(0))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_memory_that_a_step_frees_is_kept_however_much_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", FREE_3_GIB], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0
