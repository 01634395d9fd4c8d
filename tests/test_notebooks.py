"""The notebooks run from their first cell to their last, at toy size on a CPU; they are stored without outputs, and say what was run where."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from llama_jax.checkpoint import save_checkpoint
from llama_jax.convert import ConvertArgs, convert
from llama_jax.tokenizer import Tokenizer
from tests.commands import ROOT
from tests.generation.models import build

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MISSING = [name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None]
executes = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}, which pip install -e '.[notebooks]' brings"
)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def source_of(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in read(path)["cells"])


def execute(name: str, folder: Path, **environment: str) -> list[str]:
    """Run a notebook in ``folder``; what its cells printed, in order, each picture as its type."""
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LLAMA_JAX_NOTEBOOK": "toy", **environment}
    env["IPYTHONDIR"] = str(folder / ".ipython")  # the user's own settings stay out of it
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=env)
    shown: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                shown.append(output.text)
            elif "image/png" in output.get("data", {}):
                shown.append("image/png")
    return shown


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == [
        "llama2_from_scratch.ipynb", "sample_official_weights.ipynb", "stories_on_free_tpus.ipynb",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_without_traces_of_who_ran_it(path: Path) -> None:
    notebook = read(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_was_run_where_and_holds_no_token(path: Path) -> None:
    text = source_of(path)
    assert "**What was run where.**" in text and "LLAMA_JAX_NOTEBOOK" in text
    assert not re.search(r"hf_[A-Za-z0-9]{20,}", text)


@executes
@pytest.mark.slow
def test_the_tutorial_builds_trains_and_samples_and_each_piece_equals_the_packages(tmp_path: Path) -> None:
    shown = execute("llama2_from_scratch.ipynb", tmp_path)
    text = "".join(shown)
    pieces = ("my_rms_norm", "my_rotary", "my_attention", "my_swiglu", "my_block", "my_llama")
    assert text.count("the same, up to rounding") == len(pieces)
    assert shown.count("image/png") == 3, "rotary products, losses, attention"
    assert "a change at position 16 changes nothing before it" in text and "Once upon a time" in text


@executes
@pytest.mark.slow
def test_stories_are_pretrained_plotted_and_sampled(tmp_path: Path) -> None:
    shown = execute("stories_on_free_tpus.ipynb", tmp_path)
    text = "".join(shown)
    assert (tmp_path / "runs" / "stories-toy" / "checkpoints" / "12").is_dir()
    assert "run folder  runs/stories-toy" in text and "at step 12 after" in text and "best: step" in text
    assert shown.count("image/png") == 2 and text.count("Once upon a time there was a") >= 2


@executes
@pytest.mark.slow
def test_weights_in_hugging_faces_layout_are_converted_and_sampled(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In place of a download: a tiny model of random numbers, written as Hugging Face ships models."""
    model = build(small_tokenizer, n_layers=1)
    save_checkpoint(tmp_path / "random", model.params, model.args, small_tokenizer)
    source, output = str(tmp_path / "random"), str(tmp_path / "tiny-hf")
    convert(ConvertArgs(input=source, output=output, to="huggingface", chat_template="llama2"))
    found = {
        "LLAMA_JAX_NOTEBOOK_WEIGHTS": str(tmp_path / "tiny-hf"),
        "LLAMA_JAX_NOTEBOOK_PLACE": str(tmp_path / "place"),
    }
    text = "".join(execute("sample_official_weights.ipynb", tmp_path, **found))
    assert (tmp_path / "place" / "tiny-hf-int8" / "model" / "model.json").is_file()
    assert "family  LLaMA" in text and "The capital of France is" in text and text.count("\n---") == 4
