"""JAX and its compilers still have the private names, and say the words, that llama_jax/compat/jax_internals.py rests on."""

import importlib.util
import mmap
from pathlib import Path

import jax
import jaxlib
import pytest

from llama_jax.compat import jax_internals

FILE = "llama_jax/compat/jax_internals.py"
CHECK = "F0101 topology.cc:12] Check failed: chips == 4 (3 vs. 4)\n*** stack ***"


def occurs(words: str, libraries: list[Path]) -> bool:
    """Whether ``words`` stand in one of the compiled ``libraries``."""
    for path in libraries:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(words.encode()) >= 0:
                return True
    return False


def test_jax_lists_the_clusters_that_it_knows() -> None:
    clusters = importlib.import_module("jax._src.clusters")
    kinds = getattr(getattr(clusters, "ClusterEnv", None), "_cluster_types", [])
    assert {"ompi", "slurm", "tpu"} <= {kind.name for kind in kinds}, (
        f"jax {jax.__version__} has moved them; see {FILE}"
    )
    assert "K8sCluster" in {kind.__name__ for kind in kinds}, f"jax {jax.__version__} has renamed it; see {FILE}"
    assert all(hasattr(kind, "opt_in_only_method") and callable(kind.is_env_present) for kind in kinds), FILE


@pytest.mark.parametrize("words", jax_internals.LOST_PROCESS)
def test_jaxs_errors_have_the_words_that_tell_a_lost_process(words: str) -> None:
    libraries = sorted(Path(jaxlib.__file__).parent.glob("*.so"), key=lambda path: -path.stat().st_size)
    assert occurs(words, libraries), f"jaxlib {jaxlib.__version__} no longer says {words!r}; see {FILE}"


@pytest.mark.parametrize("words", ["Exceeded hbm capacity", "required for HLO temporaries", "Check failed: "])
def test_the_tpus_compiler_has_the_words_that_its_errors_are_read_by(words: str) -> None:
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        pytest.skip("needs libtpu, which the test extra brings for Linux on x86-64")
    assert occurs(words, [Path(found.origin).with_name("libtpu.so")]), f"libtpu no longer says {words!r}; see {FILE}"


def test_what_the_compiler_says_is_read() -> None:
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert jax_internals.says_memory_is_too_small(refusal) and not jax_internals.says_memory_is_too_small(
        "INTERNAL: hbm"
    )
    assert jax_internals.needed_bytes(refusal) == 17.5 * (1 << 30)
    assert (
        jax_internals.failed_check(CHECK) == "Check failed: chips == 4 (3 vs. 4)"
        and jax_internals.failed_check("") == ""
    )


def test_jax_says_which_libtpu_it_was_made_for() -> None:
    assert jax_internals.libtpu_version().startswith("0."), (
        f"jax {jax.__version__} asks for it in other words; see {FILE}"
    )
