"""Chat templates and end tokens in Hugging Face's small files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_jax.chat.formats import ChatSetup, choose, tokens_of
from llama_jax.chat.messages import Message
from llama_jax.foreign.chat_files import defaults_taken, metas_chat, read_chat
from llama_jax.tokenizer import Tokenizer
from tests.chat.vocabularies import LLAMA3, Vocabulary
from tests.tokenizers.made import put, spaced

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def read(folder: Path, tokenizer: Tokenizer, files: dict[str, Any]) -> tuple[ChatSetup, list[str]]:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_chat(folder, tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("files", "template", "words"),
    [
        ({}, "", ""),
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a", ""),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "plain", "only the default one is kept"),
        ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, "plain", ""),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, "", "none is the default"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "", "expected a text, found 3"),
        ({"tokenizer_config.json": {"chat_template": "\ud800"}}, "", "expected a text, found"),
        ({"tokenizer_config.json": {"chat_template": "a" * 300_000}}, "", "too many"),
        ({"chat_template.json": {"chat_template": "b"}}, "b", ""),
        ({"chat_template.jinja": "c\n", "tokenizer_config.json": {"chat_template": "a"}}, "c\n",
         "chat_template.jinja is kept, as by transformers; tokenizer_config.json has another chat template"),
        ({"chat_template.jinja": "c\n", "tokenizer_config.json": {"chat_template": "c\n"}}, "c\n", ""),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.json": {"chat_template": "b"}}, "a",
         "tokenizer_config.json is kept, as by transformers; chat_template.json has another"),
        ({"chat_template.jinja": "c", "additional_chat_templates/tool.jinja": "d"}, "c", "'tool': only the default"),
        ({"additional_chat_templates/default.jinja": "d"}, "d", ""),
        ({"chat_template.jinja": "c", "additional_chat_templates/default.jinja": "d"}, "d",
         "additional_chat_templates/default.jinja is kept, as by transformers; chat_template.jinja has another"),
        ({"tokenizer_config.json": {"chat_template": "a", "split_special_tokens": True}}, "a", "split_special_tokens"),
        ({"tokenizer_config.json": {"split_special_tokens": True}}, "", ""),
    ],
)  # fmt: skip
def test_the_template_is_the_one_that_transformers_takes(
    tmp_path: Path, small_tokenizer: Tokenizer, files: dict[str, Any], template: str, words: str
) -> None:
    chat, warnings = read(tmp_path, small_tokenizer, files)
    assert chat.template == template and len(warnings) == bool(words) and words in "".join(warnings)


@pytest.mark.parametrize(
    ("general", "model", "ends"),
    [
        (None, None, ()),
        (None, 2, ()),
        ([2], 5, ()),
        ([2, 7], None, (2, 7)),
        ([7, 2, 7], [2], (7, 2)),
        (None, [2, 9], (2, 9)),
        (9, [2, 7], (9,)),
        ([2, 10**6], [2], ()),
        ([True, "x", 8], [2], (8,)),
    ],
)
def test_the_end_tokens_are_those_of_generation_config_or_config(
    tmp_path: Path, small_tokenizer: Tokenizer, general: Any, model: Any, ends: tuple[int, ...]
) -> None:
    files: dict[str, Any] = {} if general is None else {"generation_config.json": {"eos_token_id": general}}
    files |= {"config.json": {"eos_token_id": model}}
    chat, warnings = read(tmp_path, small_tokenizer, files)
    assert chat.end_ids == ends
    assert bool(warnings) == (general in ([2, 10**6], [True, "x", 8]))


def test_a_generation_config_that_names_no_end_is_told(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    files = {"generation_config.json": {"bos_token_id": 1}, "config.json": {"eos_token_id": [2, 7]}}
    chat, (warning,) = read(tmp_path, small_tokenizer, files)
    assert chat.end_ids == (2, 7) and "generation_config.json has no eos_token_id" in warning


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.8}, "temperature 0.5, top_p 0.8, .*: --temperature 0.5 --top-p 0.8$"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, ""),  # the defaults of sample.py
        ({"do_sample": True, "temperature": 1.0, "top_p": 1, "top_k": None}, ""),
        ({"do_sample": False, "temperature": 0.5}, ""),
        ({"temperature": 0.5, "max_length": 4096, "pad_token_id": 0}, ""),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1, .*: --repetition-penalty 1.1$"),
        ({"suppress_tokens": [5], "num_beams": 4}, r"suppress_tokens \[5\], num_beams 4, .*; here flags decide$"),
        ({"suppress_tokens": [], "repetition_penalty": 1.0, "num_beams": 1, "forced_eos_token_id": None}, ""),
        ({"max_new_tokens": 40, "token_healing": True}, "token_healing True, .*: --max-new-tokens 40$"),
        ({"max_new_tokens": 128, "num_return_sequences": 1, "renormalize_logits": False}, ""),
        ({"repetition_penalty": "x; rm"}, r"repetition_penalty 'x; rm', .*; here flags decide$"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_settings_of_generation_that_are_not_kept_are_told(
    tmp_path: Path, small_tokenizer: Tokenizer, settings: dict[str, Any], words: str, name: str
) -> None:
    _, warnings = read(tmp_path, small_tokenizer, {name: settings | {"eos_token_id": 2}})
    assert len(warnings) == bool(words) and re.search(words, "".join(warnings))
    assert not words or warnings[0].startswith(f"{name} has ")


@pytest.mark.parametrize(("most", "told"), [(512, True), (4096, False), (20, False)])
def test_a_length_that_ends_texts_before_the_context_is_told(
    most: int, told: bool, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    files = {
        "config.json": {"max_position_embeddings": 4096},
        "generation_config.json": {"max_length": most, "eos_token_id": 2},
    }
    _, warnings = read(tmp_path, small_tokenizer, files)
    assert (
        warnings
        == [
            f"generation_config.json has max_length {most}, which transformers' generate takes by itself; here flags decide"
        ]
        * told
    )


def test_names_of_tokens_are_kept_if_they_are_not_the_tokenizers(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    same = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    assert read(tmp_path, small_tokenizer, {"tokenizer_config.json": same})[0] == ChatSetup(has_none=True)
    other = same | {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}
    chat, _ = read(tmp_path, small_tokenizer, {"tokenizer_config.json": other})
    assert chat.tokens == tokens_of(small_tokenizer) | {"eos_token": "<|im_end|>", "pad_token": "<pad>"}


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
NAMINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a token of another name": ({"tool_token": "<unk>"}, {}),
    "names in a table": ({"extra_special_tokens": {"tool_token": "<unk>"}}, {}),
    "names in the other file": ({}, {"eos_token": {"content": "<unk>", **FLAGS}, "pad_token": "</s>"}),
    "the other file beside a list of added tokens": (
        {"added_tokens_decoder": {}},
        {"eos_token": "<unk>", "pad_token": "<s>"},
    ),
    "no BOS": ({"bos_token": None}, {}),
    "names that LLaMA's class has": ({"tokenizer_class": "LlamaTokenizer"}, {}),
}


@pytest.mark.parametrize("name", NAMINGS)
def test_a_template_knows_tokens_by_the_names_that_transformers_gives_them(
    name: str, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
    settings, others = NAMINGS[name]
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings
    put(tmp_path, spaced(small_tokenizer), config)
    if others:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(others))
    tokenizer, template = (
        Tokenizer(tmp_path),
        "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ tool_token }}",
    )
    messages = [{"role": "user", "content": "a fox"}]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    chat, _ = read_chat(tmp_path, tokenizer, 400)
    assert choose(tokenizer, replace(chat, template=template), "", "x").render([Message("user", "a fox")]) == expected
    if name == "names in the other file":
        assert tokenizer.piece(tokenizer.eos_id) == "<unk>"


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("way", ["", "prepend", "always", "first"])
@pytest.mark.parametrize("model", [True, False], ids=["with a model", "a table alone"])
def test_space_marks_behind_special_tokens_are_told_where_transformers_has_others(
    model: bool, way: str, legacy: bool | None, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
    if not model and not way:
        pytest.skip("there is no vocabulary")
    if model:
        (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    put(
        tmp_path, spaced(small_tokenizer, way) if way else None, config | ({} if legacy is None else {"legacy": legacy})
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    tokenizer, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat, warnings = read_chat(tmp_path, tokenizer, 400)
    differ = False
    for text in ("a fox", " a fox"):
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        found = choose(tokenizer, chat, "", "x").encode([Message(**message) for message in messages])
        differ |= found != expected
    assert ["behind a special token" in line for line in warnings] == [True] * differ


def test_metas_llama3_ends_where_metas_code_ends(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocabulary = Vocabulary(LLAMA3)
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    chat, told = metas_chat(tmp_path, vocabulary, 128_256)  # type: ignore[arg-type]
    assert chat == ChatSetup(end_ids=tuple(vocabulary.specials[text] for text in ends)) and not told
    assert metas_chat(tmp_path, small_tokenizer, 400) == (ChatSetup(), [])
    # A template that lies beside Meta's files counts.
    (tmp_path / "chat_template.jinja").write_text("c")
    chat, _ = metas_chat(tmp_path, vocabulary, 128_256)  # type: ignore[arg-type]
    assert chat.template == "c" and len(chat.end_ids) == 3 and not chat.has_none


def test_a_template_beside_a_tokenizer_that_is_given_counts_where_the_weights_have_none(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    weights, tuned = tmp_path / "weights", tmp_path / "tuned"
    for place in (weights, tuned):
        place.mkdir()
    (tuned / "tokenizer_config.json").write_text(json.dumps({"chat_template": "tuned", "eos_token": "<|im_end|>"}))
    for given in (tuned, tuned / "tokenizer.model"):
        chat, (told,) = read_chat(weights, small_tokenizer, 400, str(given))
        assert chat.template == "tuned" and chat.tokens["eos_token"] == "<|im_end|>"
        assert f"the chat template is that of {tuned}, where the tokenizer is, since {weights} has none" in told
    assert read_chat(weights, small_tokenizer, 400) == (ChatSetup(has_none=True), [])
    (weights / "chat_template.jinja").write_text("own")
    chat, (told,) = read_chat(weights, small_tokenizer, 400, str(tuned))
    assert chat.template == "own" and f"that of {weights}, which is kept" in told
    assert read_chat(weights, small_tokenizer, 400, str(weights))[1] == []


def test_what_is_known_about_conversations_is_kept_in_files(tmp_path: Path) -> None:
    for number, chat in enumerate(
        (
            ChatSetup(),
            ChatSetup("{{ é }}\n"),
            ChatSetup("", (5, 2), {"bos_token": "<s>"}),
            ChatSetup("a", (1,)),
            ChatSetup(has_none=True),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in chat.files.items():
            (folder / name).write_bytes(content)
        assert ChatSetup.read(folder) == chat
        assert len(list(folder.iterdir())) == bool(chat.template) + bool(chat.end_ids or chat.tokens or chat.has_none)


@pytest.mark.parametrize(
    ("general", "model", "words"),
    [
        ({"eos_token_id": 2, "do_sample": True}, {}, []),
        (None, {"eos_token_id": 2}, []),
        (None, {}, ["no eos_token_id; completions end with '</s>', the tokenizer's EOS (2)"]),
        ({"eos_token_id": 2}, {}, ["does not ask for sampling (do_sample)"]),
        ({"do_sample": False}, {"eos_token_id": None}, ["no eos_token_id", "unless --temperature is 0"]),
    ],
)
def test_what_the_files_do_not_say_is_told(
    tmp_path: Path, small_tokenizer: Tokenizer, general: dict[str, Any] | None, model: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    if general is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(general))
    lines = defaults_taken(tmp_path, small_tokenizer)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
