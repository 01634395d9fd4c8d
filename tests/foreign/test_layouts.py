"""Which files of a folder are the model: what transformers loads, whatever lies beside it; never another, and never unsaid."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, open_source
from llama_jax.convert.layout import TABLE, all_tensors
from llama_jax.convert.safetensors import SafetensorsWriter
from llama_jax.convert.source import Source
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.convert.test_convert import random_weights, write_meta_folder

ARGS = ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, multiple_of=8, vocab_size=400, max_seq_len=64)
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": ARGS.hidden_width, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip
NORM = next(tensor for tensor in TABLE if tensor.name == "norm")


def marked(value: float) -> dict[str, np.ndarray]:
    """A model in Hugging Face's names whose last norm holds ``value`` alone, by which it is known again."""
    weights = random_weights(ARGS, np.dtype("<f4"))
    named = {t.huggingface.format(layer): weights[t.meta.format(layer)] for t, layer in all_tensors(ARGS)}
    return named | {"model.norm.weight": np.full(16, value, np.float32)}


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with SafetensorsWriter(path, np.dtype("<f4"), {name: tensor.shape for name, tensor in tensors.items()}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)


def whole(folder: Path) -> None:
    save(folder / "model.safetensors", marked(1))


def sharded(folder: Path, there: bool = True) -> None:
    tensors = list(marked(2).items())
    groups = {
        "model-00001-of-00002.safetensors": dict(tensors[:5]),
        "model-00002-of-00002.safetensors": dict(tensors[5:]),
    }
    places = {name: file for file, group in groups.items() for name in group}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, group in groups.items():
        if there:
            save(folder / file, group)


def stale(folder: Path) -> None:
    sharded(folder, there=False)


def pickled(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(tensor) for name, tensor in marked(3).items()}, folder / "pytorch_model.bin")


def config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))


def meta(folder: Path) -> None:
    other = folder.parent / "made"
    weights = random_weights(ARGS, np.dtype("<f4"))
    weights["norm.weight"] = np.full(16, 4, np.float32)
    write_meta_folder(other, ARGS, weights, 1, Tokenizer(folder / "tokenizer.model"))
    for name in ("params.json", "consolidated.00.pth"):
        shutil.move(other / name, folder / name)
    shutil.rmtree(other)


def params(folder: Path) -> None:
    table = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(table))


def mistral(folder: Path) -> None:
    weights = random_weights(ARGS, np.dtype("<f4")) | {"norm.weight": np.full(16, 5, np.float32)}
    save(folder / "consolidated.safetensors", weights)


def original(folder: Path) -> None:
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    meta(folder / "original")


PARTS: list[Callable[[Path], None]] = [config, whole, sharded, stale, pickled, meta, params, mistral, original]
ALIKE = [{sharded, stale}, {meta, params}]  # the one would take the other's place
MIXTURES = [
    group
    for size in (1, 2, 3)
    for group in itertools.combinations(PARTS, size)
    if (size < 3 or config in group) and not any(alike <= set(group) for alike in ALIKE)
]


@pytest.fixture
def folder(small_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    return folder


@contextlib.contextmanager
def opened(folder: Path, **fields: Any) -> Any:
    with contextlib.ExitStack() as stack:
        yield open_source(folder, ConvertArgs(input=str(folder), **fields), stack)


def mark(source: Source) -> float:
    return float(np.array(source.rows(NORM, 0, 0, 16))[0])


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.mark.parametrize("parts", MIXTURES, ids=lambda parts: "+".join(part.__name__ for part in parts))
def test_what_transformers_loads_is_read_and_nothing_else(
    parts: tuple[Callable[[Path], None], ...], folder: Path, transformers: Any
) -> None:
    for part in parts:
        part(folder)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        theirs = float(model.model.norm.weight.detach()[0])
    except Exception:
        theirs = None
    try:
        with opened(folder) as source:
            found, said = mark(source), source.decided
    except UserError as error:
        assert "expected" in str(error) and "found" in str(error)
        # What this project can read is not refused for what lies beside it.
        assert theirs is None and meta not in parts and not {mistral, params} <= set(parts), error
        return
    assert found == (theirs or (4 if meta in parts else 5))
    assert "not read" in said or set(parts) <= {config, whole, sharded, stale, pickled, meta, original, params, mistral}
    passed_over = {
        whole: "model.safetensors",
        pickled: "pytorch_model.bin",
        meta: "consolidated.00.pth",
        mistral: "consolidated.safetensors",
    }
    for part, name in passed_over.items():
        if part in parts and {whole: 1, pickled: 3, meta: 4, mistral: 5}[part] != found:
            assert name in said.partition("not read: ")[2]


def test_an_adapter_beside_a_model_is_refused_and_either_can_be_chosen(folder: Path) -> None:
    config(folder)
    whole(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(UserError, match=r"found an adapter .* --layout huggingface"), opened(folder):
        pass
    with opened(folder, layout="huggingface") as source:
        assert mark(source) == 1 and "not read: adapter_config.json" in source.decided


def test_a_layout_that_is_not_there_is_refused_and_not_taken_for_another(folder: Path) -> None:
    meta(folder)
    for layout in ("huggingface", "mistral", "llama2c", "llama-jax"):
        refused = pytest.raises(
            UserError, match=rf"^--layout: expected files of {layout} in .*, found those of meta alone;"
        )
        with refused, opened(folder, layout=layout):
            pass


def test_the_layout_chooses_between_two_models(folder: Path) -> None:
    config(folder)
    whole(folder)
    meta(folder)
    with opened(folder) as source:
        assert mark(source) == 1 and source.family.startswith("LLaMA") and "(config.json)" in source.family
    with opened(folder, layout="meta") as source:
        assert mark(source) == 4 and source.family.startswith("LLaMA") and "(params.json)" in source.family
    pickled(folder)
    with opened(folder) as source:
        assert mark(source) == 1 and "not read: consolidated.00.pth, params.json, pytorch_model.bin" in source.decided
    (folder / "model.safetensors").unlink()
    with opened(folder) as source:
        assert mark(source) == 3 and "pytorch_model.bin, which transformers would load" in source.decided


def test_a_folder_of_links_is_read_as_hugging_faces_cache_has_it(folder: Path, tmp_path: Path) -> None:
    config(folder)
    sharded(folder)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    with opened(snapshot) as source:
        assert mark(source) == 2
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(UserError, match=r"a link to nothing: its download was not finished"), opened(snapshot):
        pass


def test_the_file_that_the_configuration_names_is_read(folder: Path, transformers: Any) -> None:
    whole(folder)
    save(folder / "other.safetensors", marked(7))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "other.safetensors"}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with opened(folder) as source:
        assert mark(source) == float(model.model.norm.weight.detach()[0]) == 7
    for name in ("../other.safetensors", "/etc/passwd", "missing.safetensors"):
        (folder / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": name}))
        with pytest.raises(UserError, match=r"safetensors"), opened(folder):
            pass


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_matrix_is_read_by_whichever_name_it_has(missing: str, folder: Path, transformers: Any) -> None:
    tensors = marked(1)
    del tensors[missing]
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with opened(folder) as source:
        for tensor, theirs in ((TABLE[0], model.model.embed_tokens), (TABLE[-1], model.lm_head)):
            np.testing.assert_array_equal(source.rows(tensor, 0, 0, 400), theirs.weight.detach().numpy())


def test_an_index_of_other_shards_is_told(folder: Path) -> None:
    config(folder)
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with opened(folder) as source:
        assert mark(source) == 2 and any("'model.norm.weight'" in warning for warning in source.warnings)
