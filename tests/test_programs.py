"""What is printed to be typed is right for how the process was started."""

import shutil
from pathlib import Path

import pytest

from llama_jax import programs
from llama_jax.programs import install_command, named, started_as, typed
from tests.commands import ROOT


def start(monkeypatch: pytest.MonkeyPatch, *argv: str, folder: Path = ROOT) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", list(argv))


@pytest.mark.parametrize(
    "argv0", ["train.py", "./train.py", str(ROOT / "train.py"), f"{ROOT}/llama_jax/evaluate.py", "-c", ""]
)
def test_in_a_clone_scripts_are_typed(argv0: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, argv0)
    assert [typed(name) for name in ("train", "sample", "convert", "evaluate", "plan", "data")] == [
        "python train.py", "python sample.py", "python convert_torch_weights.py", "python -m llama_jax.evaluate",
        "python -m llama_jax.plan", "python -m llama_jax.data",
    ]  # fmt: skip
    assert install_command() == "pip install -e ." and install_command("tpu") == "pip install -e '.[tpu]'"
    assert named("sample") == "sample.py" and named("plan") == "-m llama_jax.plan"


def test_from_another_folder_the_scripts_path_is_typed_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start(monkeypatch, str(ROOT / "train.py"), folder=tmp_path)
    assert typed("sample") == f"python {ROOT}/sample.py" and named("sample") == "sample.py"
    assert install_command("gcs") == f"pip install -e '{ROOT}[gcs]'"
    (tmp_path / "my clone").symlink_to(ROOT)
    start(monkeypatch, "my clone/train.py", folder=tmp_path)
    assert typed("sample") == "python 'my clone/sample.py'"
    start(monkeypatch, str(tmp_path / "train.py"), folder=tmp_path)  # another program of this name
    assert typed("sample") == f"python {ROOT}/sample.py"


def test_the_console_command_and_the_module_name_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start(monkeypatch, "/usr/bin/llama-jax", "train", "my.txt", folder=tmp_path)
    assert typed("sample") == named("sample") == "llama-jax sample" and started_as() == "llama-jax train"
    start(monkeypatch, f"{programs.PACKAGE}/__main__.py", "train", folder=tmp_path)
    assert typed("sample") == "python -m llama_jax sample" and started_as() == "llama-jax train"
    start(monkeypatch, "train.py", "my.txt")
    assert started_as() == "train.py"


def test_an_installed_package_has_the_console_command_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    for argv0 in ("", "-c", "/site-packages/llama_jax/evaluate.py", str(shutil.which("pytest"))):
        start(monkeypatch, argv0)
        assert typed("sample") == "llama-jax sample" and typed("plan") == "llama-jax plan"
    assert install_command("tpu") == "pip install 'llama-jax[tpu]'" and install_command() == "pip install llama-jax"
