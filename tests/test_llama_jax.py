"""The package and its console command: what an import leaves alone, what a command says, what is declared."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llama_jax
from llama_jax.commands import COMMANDS
from tests.commands import ROOT, run, told

# Prints what an import may change in a process, as JSON, after each of the imports that are its arguments.
STATE = """
import atexit, gc, importlib, json, locale, logging, os, signal, sys, threading, warnings

def state():
    names = ["", *sorted(logging.root.manager.loggerDict)]
    loggers = {name: logging.getLogger(name) for name in names}
    hooks = "excepthook unraisablehook displayhook breakpointhook __excepthook__".split()
    found = {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path,
        # A logger that a library makes, and leaves as it is, changes nothing.
        "loggers": {
            name: [x.level, x.propagate, x.disabled, str(x.handlers), str(x.filters)] for name, x in loggers.items()
            if x.level or x.disabled or x.handlers or x.filters or not x.propagate
        },
        "log class": str(logging.getLoggerClass()), "disabled below": logging.root.manager.disable,
        "warnings": [str(rule) for rule in warnings.filters], "showwarning": str(warnings.showwarning),
        "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "wakeup": signal.set_wakeup_fd(-1),
        "hooks": {name: str(getattr(sys, name)) for name in hooks}, "thread hook": str(threading.excepthook),
        "streams": [str(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "threads": [thread.name for thread in threading.enumerate()], "exits": atexit._ncallbacks(),
        "finders": [str(finder) for finder in sys.meta_path], "recursion": sys.getrecursionlimit(),
        "collector": [gc.get_threshold(), gc.isenabled()], "locale": locale.setlocale(locale.LC_ALL),
        "files": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [],
    }
    if "fsspec" in sys.modules:
        import fsspec
        found["fsspec"] = [str(fsspec.config.conf), str(sorted(fsspec.registry)), str(fsspec.available_protocols())]
    if "jax" in sys.modules:
        import jax
        found["jax"] = {name: str(value) for name, value in jax.config.values.items()}
    if "numpy" in sys.modules:
        import numpy
        found["numpy"] = [str(numpy.geterr()), str(numpy.get_printoptions())]
    if "matplotlib" in sys.modules:
        import matplotlib
        found["matplotlib"] = str(dict.items(matplotlib.rcParams))
    return found

for names in sys.argv[1:]:
    for name in names.split(","):
        importlib.import_module(name)
    print(json.dumps(state()))
"""
# What the package imports of others, each of which changes what it likes.
OTHERS = (
    "absl.logging,etils.epath,flax.linen,fsspec,grain,jax,jax.experimental.mesh_utils,jax.experimental.multihost_utils,"
    "matplotlib.figure,ml_dtypes,numpy,optax,orbax.checkpoint,sentencepiece,tensorstore,tqdm,tyro,json,logging,signal"
)
OURS = [
    "llama_jax", "llama_jax.generation", "llama_jax.training.loop", "llama_jax.convert", "llama_jax.evaluate",
    "llama_jax.plan.command", "llama_jax.data.__main__", "llama_jax.sample", "llama_jax.commands", "llama_jax.__main__",
]  # fmt: skip


def states(*imports: str) -> list[dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", STATE, *imports], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_importing_llama_jax_changes_nothing_in_the_process() -> None:
    before, after = states("json,logging", "llama_jax")
    assert after == before


def test_importing_any_of_its_modules_changes_nothing_beyond_what_libraries_do() -> None:
    before, *others = states(OTHERS, *OURS)
    for module, after in zip(OURS, others, strict=True):
        for what, value in before.items():
            assert after[what] == value, f"{what}, by {module}"
        assert after.keys() == before.keys()


def test_importing_llama_jax_imports_nothing_that_takes_a_while() -> None:
    program = "import sys, llama_jax.commands; print([m for m in ('jax', 'numpy', 'tyro', 'orbax', 'absl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_the_parts_that_the_page_names_are_attributes_of_the_package() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    names = sorted({re.match(r"llama_jax\.(\w+)", found)[1] for found in re.findall(r"^::: (\S+)", page, re.MULTILINE)})  # type: ignore[index]
    code = "import sys, llama_jax\nfor name in sys.argv[1:]: getattr(llama_jax, name)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", llama_jax.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "llama_jax/__init__.py"
    assert (ROOT / "llama_jax" / "py.typed").exists()


def test_the_console_command_tells_its_commands_and_versions(tmp_path: Path) -> None:
    shown = run(["-m", "llama_jax", "--help"], tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for name in ("train", "sample", "convert", "evaluate", "plan", "data"):
        assert re.search(rf"^python -m llama_jax {name} +\w", shown.stdout, re.MULTILINE), name
    version = run(["-m", "llama_jax", "--version"], tmp_path)
    jax = re.escape(importlib.metadata.version("jax"))
    assert re.fullmatch(
        rf"llama-jax {re.escape(llama_jax.__version__)}, jax {jax}, Python 3\.\d+\.\d+\n", version.stdout
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected a command, one of train, sample, convert, evaluate, plan, recipe, data, found none"),
        (["sampel"], "found sampel; perhaps you meant sample"),
        (["serve"], "found serve; `python -m llama_jax --help` says what each does"),
        (["--config", "tiny"], "found --config; `python -m llama_jax --help`"),
        (["train", "--config", "nope"], "finetune, llama2-13b,"),
        (["train", "--bad"], "`python -m llama_jax train --help` lists all flags"),
        (
            ["sample"],
            "--ckpt: expected a checkpoint folder, found none; python -m llama_jax train makes one in runs/tiny",
        ),
    ],
)
def test_what_the_console_command_refuses_it_says_in_one_line(argv: list[str], words: str, tmp_path: Path) -> None:
    line = told(run(["-m", "llama_jax", *argv], tmp_path))
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_missing_dependency_is_told_by_every_command(command: str, tmp_path: Path) -> None:
    """In place of each package that is installed there is one that cannot be imported."""
    program = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "tyro", "numpy", "orbax", "absl"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
sys.argv = ["llama-jax", {command!r}, "--ckpt=a", "--text=b"]
from llama_jax.commands import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"error: \w+: expected to be installed, found none; pip install -e \. installs all$", done.stderr)


def requirements() -> dict[str, str]:
    """The packages that pyproject.toml asks for, of all extras, with their versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]*\])?([^;]*)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2].strip() for match in found if match}


def test_every_package_that_is_imported_is_declared_with_a_lower_bound() -> None:
    declared = requirements()
    packages = {"orbax": "orbax-checkpoint", "absl": "absl-py"}
    own = {"llama_jax", *sys.stdlib_module_names}
    for path in [*ROOT.glob("llama_jax/**/*.py"), *ROOT.glob("*.py")]:
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            if (
                re.search(rf"^\s*(from {name}\b.* import|import {name}\b)", path.read_text(), re.MULTILINE)
                and name not in own
            ):
                package = packages.get(name, name).lower().replace("_", "-")
                assert ">=" in declared.get(package, ""), f"{path}: {name}"
    assert "<1" in declared["orbax-checkpoint"], "1.0 gives its top-level names to another API"


def test_the_extras_that_texts_name_are_those_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("llama_jax/**/*.py"),
        *ROOT.glob("benchmarks/*.*"),
    ]
    named = {}
    for path in texts:
        for words in re.findall(
            r"(?:llama-jax|\.)\[([a-z][a-z0-9,]*)\]|install_command\(['\"](\w+)['\"]\)", path.read_text()
        ):
            named |= dict.fromkeys("".join(words).split(","), path)
    assert {"cuda", "cuda13", "rocm", "tpu", "test", "gcs", "tensorboard"} <= named.keys() <= set(extras), named
