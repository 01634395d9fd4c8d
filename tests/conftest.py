"""Fixtures that several rooms share."""

import gc
import importlib.metadata
import os
import signal
import sys
import tempfile
from pathlib import Path

# Before JAX is imported: with the TPU's compiler installed it would look for a TPU first, and say that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are compiled for longer than they run here: without optimisation, and without the newer code generator for what is
# fused, a training step compiles in an eighth of the time; each in one piece, in four fifths of the rest. A slow test runs the
# documented commands as users do, without these flags, wherever a program or a setting is new; XLA_FLAGS= in the environment
# has all tests compiled so.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    # Later versions have the newer generator alone, and end on the flag.
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else ""),
)
# One session's processes share what they compile; the next begins anew, and leaves the user's own programs alone.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A shell starts what runs behind it deaf to Ctrl-C, and so would be all that the tests start, and then interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with the end of a terminal.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis
import jax
import pytest

from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests.commands import make_place

TEXT = """Once upon a time there was a small brown fox who lived by the river, under an old tree.
Every morning she went out to look at the water, and every evening she came home again.
"Where have you been?" asked the owl. "By the river," said the fox, "I saw 12 boats and 345 ducks!"

    The owl laughed.  It had not seen a boat since 1987, when the river was still the sea.
Où est le hibou? Là-bas, près de l'arbre. Schön wär's, sagte der Fuchs über den großen Fluß.
"""


# Begun first, in this order: a long file that came last would leave the other processes idle.
LONGEST = [
    "test_commands.py",
    "test_programs.py",
    "test_built_in_chats.py",
    "test_adapters.py",
    "test_notebooks.py",
    "test_signals.py",
    "test_accelerator.py",
    "test_families.py",
    "test_on_ray.py",
    "test_decoding.py",
    "test_distributed.py",
    "test_plan.py",
    "test_loop.py",
    "test_lora.py",
    "test_widths.py",
    "test_pieces.py",
    "test_eight_bits.py",
    "test_fields.py",
    "test_muon.py",
    "test_sharding.py",
    "test_speculative.py",
    "test_quantize.py",
    "test_mesh.py",
    "test_decode.py",
]


# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

# Linux gives a process 65,530 memory mappings. A compiled program takes some dozens for as long as JAX keeps it.
MOST_MAPPINGS = 15_000
SINCE_LOOKED: list[str] = []


# Seconds that a slow test may take on a machine that does much else, unless it has a limit of its own.
SLOW_SECONDS = 2400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let go of compiled programs before the process reaches Linux's limit on memory mappings, where it would crash."""
    SINCE_LOOKED.append(item.nodeid)
    if nextitem is not None and nextitem.path == item.path and len(SINCE_LOOKED) < 20:
        return
    SINCE_LOOKED.clear()
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show a failure when it happens: a session that is ended from outside has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.__stderr__.write(f"\n{report.nodeid} failed in its {report.when}\n{report.longreprtext[-2000:]}\n")
        sys.__stderr__.flush()


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "tokenizers").is_dir():
        pytest.skip("needs LLaMA 2's tokenizer in the folder ../shared, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def llama2_tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer(shared / "tokenizers" / "llama2" / "tokenizer.model")


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and with a small run in runs/tiny, for commands to work in."""
    return make_place(tmp_path_factory.mktemp("place"))
