"""What is said of a part of a checkpoint, or of a run, that is given in place of the whole."""

import shutil
from pathlib import Path

from llama_jax.foreign.folders import found_in


def test_a_part_of_a_checkpoint_or_of_a_run_names_the_whole(place: Path) -> None:
    run = place / "runs" / "tiny"
    step = max((run / "checkpoints").iterdir(), key=lambda path: path.name.isdecimal() and int(path.name))
    for part in ("params", "model", "state", "checksums.json"):
        assert found_in(step / part) == f"found a part of the checkpoint {step}; give that folder"
    assert found_in(step / "model" / "model.json") == f"found a part of the checkpoint {step}; give that folder"
    for part in ("config.toml", "tokenizer.model", "tokens"):
        assert found_in(run / part) == f"found a part of the run {run}; give that folder"


def test_our_checkpoint_without_its_small_files_is_not_taken_for_another_projects(place: Path, tmp_path: Path) -> None:
    steps = place / "runs" / "tiny" / "checkpoints"
    step = next(path for path in steps.iterdir() if path.name.isdecimal())
    copy = shutil.copytree(step, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    assert found_in(copy).startswith("found a checkpoint of this project without its folder model; use another copy")
    tokens = shutil.copytree(place / "runs" / "tiny" / "tokens", tmp_path / "tokens")
    assert found_in(tokens).startswith("found a folder of prepared tokens")
