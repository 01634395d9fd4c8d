"""--config takes a file, or the name of a configuration that comes with the package."""

from pathlib import Path

import pytest

from llama_jax.cli.configurations import FOLDER, find_config, names
from llama_jax.config import load_toml
from llama_jax.errors import UserError
from tests.commands import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_configurations_are_found_by_name_from_any_folder() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} == set(names()) > {"tiny", "shakespeare"}
    for name in names():
        for given in (name, f"{name}.toml"):
            path, notes = find_config(given)
            assert path == FOLDER / f"{name}.toml" and notes == []
        load_toml(path).check()


def test_a_file_comes_before_a_configuration_of_its_name_and_that_is_told(tmp_path: Path) -> None:
    for given in ("tiny", "tiny.toml"):
        Path(given).write_text("[train]\nlr = 0.5\n")
        path, notes = find_config(given)
        assert load_toml(path).train.lr == 0.5
        assert notes == [f"--config {given}: read from the file {tmp_path / given}"]
    assert find_config("./tiny.toml") == (Path("tiny.toml"), [])


def test_a_folder_is_no_configuration() -> None:
    Path("tiny").mkdir()
    assert find_config("tiny") == (FOLDER / "tiny.toml", [])
    with pytest.raises(
        UserError, match=r"^--config: expected a TOML file or one of .*found no file \.; name one of these"
    ):
        find_config(".")


@pytest.mark.parametrize("given", ["nope", "configs/nope.toml", "nope.toml", "configs/"])
def test_an_unknown_name_lists_those_that_there_are(given: str) -> None:
    with pytest.raises(UserError) as caught:
        find_config(given)
    line = str(caught.value)
    assert given in line and all(name in line for name in names()) and "\n" not in line


def test_the_path_of_a_clone_says_the_name_elsewhere() -> None:
    with pytest.raises(UserError, match="--config shakespeare takes that one"):
        find_config("configs/shakespeare.toml")
