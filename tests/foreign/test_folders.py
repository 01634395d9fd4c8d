"""What commands say about a folder or a file that is no checkpoint of ours: what it is, why not, and what to type."""

import json
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from llama_jax.checkpoint import Checkpoint
from llama_jax.convert import ConvertArgs, convert
from llama_jax.errors import UserError
from llama_jax.foreign.commands import convert_command
from llama_jax.tokenizer import Tokenizer
from tests import inside
from tests.commands import ROOT, SMALL, told
from tests.foreign.test_layouts import CONFIG, config, meta, mistral, original, params, pickled, stale, whole


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("nowhere")


GPTQ = {"quant_method": "gptq", "bits": 4}
LONGROPE = {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}
# Files of a folder, by name or by function, and what is said of it.
FOLDERS: dict[str, tuple[list[Any], str]] = {
    "hugging face's": ([config, whole], r"Hugging Face's layout .* python \S*convert_torch_weights\.py --input model --output checkpoints/model$"),
    "meta's": ([meta], r"Meta's layout .* python \S*convert_torch_weights\.py --input model --output checkpoints/model$"),
    "a pickle": ([config, pickled], r"Hugging Face's layout .* python \S*convert_torch_weights\.py --input model --output checkpoints/model$"),
    "an adapter": ([("adapter_config.json", {"base_model_name_or_path": "llama"})], r"an adapter \(LoRA\) of 'llama'; .*merge_and_unload.* && python \S*convert_torch_weights\.py --input model-merged"),
    "an adapter with a configuration": ([config, ("adapter_config.json", {})], r"an adapter \(LoRA\); .*merge_and_unload"),
    "gptq": ([whole, ("config.json", CONFIG | {"quantization_config": GPTQ})], r"quantization_config: .*'gptq'.* --weights int8"),
    "gptq of old": ([("quantize_config.json", {}), ("gptq_model-4bit.safetensors", "x")], r"\(GPTQ\)"),
    "longrope, before its tokenizer": ([whole, "no tokenizer", ("config.json", CONFIG | LONGROPE)], r"rope_scaling: rope_type: .*'longrope'"),
    "llama 3's tokenizer": ([meta, ("tokenizer.model", "IQ== 0\nIg== 1\n")], r"tokenizer\.model: expected a token for each of the 256 bytes"),
    "qwen": ([whole, ("config.json", CONFIG | {"model_type": "qwen2"})], r"model_type: expected 'llama' or 'mistral', found 'qwen2'"),
    "mistral's own": ([params, mistral], r"Mistral's layout .* python \S*convert_torch_weights\.py --input model --output checkpoints/model$"),
    "gpt-2, before its weights": ([("config.json", {"model_type": "gpt2"})], r"model_type: expected 'llama' or 'mistral', found 'gpt2'"),
    "gguf": ([("model.gguf", "GGUF")], r"a model in GGUF"),
    "gguf with a configuration": ([config, ("model.Q4_K_M.gguf", "GGUF")], r"a model in GGUF \('model.Q4_K_M.gguf'\), which is not read; take the model that it was made from"),
    "awq": ([whole, ("config.json", CONFIG | {"quantization_config": {"quant_method": "awq", "bits": 4}})], r"quantization_config: .*'awq'.* --weights int8"),
    "bitsandbytes": ([whole, ("config.json", CONFIG | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})], r"quantization_config: .*bitsandbytes.* --weights int8"),
    "no configuration": ([whole], r"weights without a config\.json or params\.json"),
    "a link to nothing": ([config, dangling], r"found model\.safetensors, a link to nothing: its download was not finished, or its target is gone"),
    "half a download": ([config, ("model.safetensors.incomplete", "x")], r"'model\.safetensors\.incomplete', of a download that was not finished"),
    "no weights": ([config], r"found neither; download the weights too"),
    "lost shards": ([config, stale], r"expected 'model-00001-of-00002\.safetensors' beside it"),
    "meta's below": ([config, original], r"Meta's in original; .*--input model/original --output checkpoints/model$"),
    "orbax": ([("1000/_CHECKPOINT_METADATA", {})], r"an orbax checkpoint of another project"),
    "orbax without steps": ([("manifest.ocdbt", "x")], r"an orbax checkpoint of another project"),
    "litgpt": ([("lit_model.pth", "x")], r"a checkpoint of litgpt"),
    "deepspeed": ([("zero_to_fp32.py", "x")], r"a checkpoint of DeepSpeed"),
    "tensorflow": ([("tf_model.h5", "x")], r"a model of TensorFlow"),
    "tokens": ([("manifest.json", {})], r"prepared tokens"),
    "a run": ([("config.toml", "")], r"a run with no checkpoint in it"),
    "models below": ([("a/config.json", CONFIG), ("b/params.json", {}), ("c/consolidated.00.pth", "x")], r"below it: model/a, model/c; give one"),
    "a cache": ([("snapshots/0123/config.json", CONFIG), ("refs/main", "0123")], r"below it: model/snapshots/0123; give one"),
    "nothing": ([], r"found no checkpoint in it$"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(place: Path, files: list[Any], tokenizer: Tokenizer) -> Path:
    folder = place / "model"
    folder.mkdir()
    if any(callable(file) for file in files) and "no tokenizer" not in files:
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    for file in files:
        if callable(file):
            file(folder)
        elif isinstance(file, tuple):
            name, content = file
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_kind_is_told_with_what_to_do(name: str, place: Path, small_tokenizer: Tokenizer) -> None:
    files, words = FOLDERS[name]
    make(place, files, small_tokenizer)
    with pytest.raises(UserError, match=words) as caught:
        Checkpoint.find("model")
    message = str(caught.value)
    assert "\n" not in message and "expected" in message and "found" in message
    try:
        convert(ConvertArgs(input="model", dry_run=True))
        assert name in ("hugging face's", "meta's", "a pickle", "mistral's own")
    except UserError as error:
        # The converter has the same reason, but that it asks for the base of an adapter.
        assert str(error) in message or (name.startswith("an adapter") and str(error).startswith("--base: expected"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGUF\3", "a file in GGUF"),
        ("model.tar.gz", b"\x1f\x8b\x08", "a file of gzip; unpack it"),
        ("weights.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("weights.safetensors", b"<!DOCTYPE html>", "of HTML"),
        ("stories15M.bin", b"\0\1", "a file of weights; give a folder"),
        ("consolidated.00.pth", b"PK\3\4", "convert_torch_weights.py --input . --output"),
        ("note.txt", b"hello", "a file; give a folder"),
        ("stories15M.bin", b"", "an empty file; download it again"),
    ],
)  # fmt: skip
def test_a_file_is_told_with_what_to_do(name: str, content: bytes, words: str, place: Path) -> None:
    (place / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{name}: expected a checkpoint folder, found ") as caught:
        Checkpoint.find(name)
    assert words in str(caught.value)
    with pytest.raises(UserError, match=rf"^--input: {name}: expected a folder, found "):
        convert(ConvertArgs(input=name, output="out"))


def test_other_models_of_llama2c_beside_a_file_say_nothing_about_it(place: Path) -> None:
    sizes = struct.pack("<7i", 32, 48, 1, 4, 4, 64, 16)
    for name in ("whole.bin", "other.bin"):
        (place / name).write_bytes(sizes + bytes(40_000))  # each is refused, too
    (place / "cut.bin").write_bytes(sizes)
    with pytest.raises(
        UserError, match=r"^--input: cut\.bin: expected a folder, found a file of weights; give a folder"
    ):
        convert(ConvertArgs(input="cut.bin", output="out"))


def test_the_command_that_is_told_converts_and_its_output_is_found(place: Path, small_tokenizer: Tokenizer) -> None:
    folder = make(place, [config, whole], small_tokenizer)
    folder.rename(place / "my 'own' model")
    (place / "checkpoints" / "my 'own' model").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        Checkpoint.find("my 'own' model")
    command = shlex.split(str(caught.value).partition("give the result: ")[2])
    assert command[:2] == ["python", str(ROOT / "convert_torch_weights.py")]
    convert(ConvertArgs(input=command[3], output=command[5]))
    assert Checkpoint.find(command[5]).args.dim == 16


def test_a_name_on_the_hub_is_told_how_to_fetch(place: Path) -> None:
    with pytest.raises(
        UserError, match=r"found nothing; .* hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf$"
    ):
        Checkpoint.find("meta-llama/Llama-2-7b-hf")
    (place / "runs").mkdir()
    with pytest.raises(UserError, match=r"runs/tinny: expected a checkpoint folder, found nothing$"):
        Checkpoint.find("runs/tinny")


def test_a_snapshot_of_a_cache_is_called_by_its_models_name(place: Path) -> None:
    folder = Path("models--meta-llama--Llama-2-7b-hf/snapshots/0123")
    assert convert_command(folder).endswith(" --output checkpoints/Llama-2-7b-hf")


@pytest.mark.parametrize(
    "argv",
    [
        ["sample.py", "hello", "--ckpt", "model"],
        ["-m", "llama_jax.evaluate", "--text", "text", "--ckpt", "model"],
        ["train.py", *SMALL, "--data.filepath", "text", "--train.save-dir", "run", "--train.init-from", "model"],
    ],
    ids=["sample", "evaluate", "train"],
)
def test_commands_say_why_a_model_cannot_be_converted_and_leave_nothing(
    argv: list[str], tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    make(
        tmp_path,
        [whole, ("config.json", CONFIG | {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}), "no tokenizer"],
        small_tokenizer,
    )
    (tmp_path / "text").write_text("The fox went to the river.\n" * 50)
    line = told(inside.run(argv, tmp_path, environment={"XDG_CACHE_HOME": str(tmp_path / "cache")}))
    assert "model: expected a model that can be converted, found: model/config.json: rope_scaling: " in line
    shutil.rmtree(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
