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


# Programs with a hundred megabytes of temporaries each, without waiting for one before the next is called.
STEPS_IN_A_ROW = """
import resource
from llama_jax.devices.memory import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    return jax.lax.fori_loop(0, 4, lambda _, wide: jnp.flip(wide) + 1, jnp.ones((25_000_000,)) * x)[0]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

temporary = step.lower(jnp.ones(())).compile().memory_analysis().temp_size_in_bytes // 1024
x = jax.block_until_ready(step(jnp.ones(())))
before = peak()
for _ in range(8):
    x = step(x)
jax.block_until_ready(x)
print(temporary, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sizes in KiB")
def test_steps_that_are_called_in_a_row_take_the_memory_of_one() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS_IN_A_ROW], capture_output=True, text=True, check=True)
    temporary, more = map(int, done.stdout.split())
    assert temporary > 90_000 and more < temporary / 2
