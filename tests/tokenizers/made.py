"""Tokenizers of every kind, made here with the tokenizers library, and random texts to compare them on."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from llama_jax.foreign.tokenizer_json import SPACE, tokenizer_json
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizers.tiktoken import PATTERN
from tests.conftest import TEXT

Table = dict[str, Any]
MORE = "def f(x):\n    return x + 1  # one\n\n\nnaïve café 12345 你好 世界 Привет 😀👨‍👩‍👧 don't WE'LL\t\tend\r\n"
BOS, EOS, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
CONFIG = {
    "bos_token": BOS,
    "eos_token": {"content": EOS, "special": True},
    "tokenizer_class": "PreTrainedTokenizerFast",
}
LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}


def bytewise(pattern: str = PATTERN, size: int = 420) -> Table:
    """The table of a byte-level BPE vocabulary, as LLaMA 3's is, that puts BOS first."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, MORE], trainer)
    tokenizer.add_special_tokens([BOS, EOS, TURN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return table_of(tokenizer)


def spaced(base: Tokenizer, way: str = "prepend") -> Table:
    """The table of a SentencePiece model, as TinyLlama has it: with a normalizer, or by a scheme of Metaspace.

    The way "split" is the scheme "always", with words taken apart before they are merged.
    """
    table, _ = tokenizer_json(base)
    assert table is not None
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    table["added_tokens"] = [{"id": i, "content": text, **flags} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    if way != "prepend":
        table["normalizer"] = None
        scheme = "always" if way == "split" else way
        table["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": way == "split"
        }  # fmt: skip
    return table


def table_of(tokenizer: tokenizers.Tokenizer) -> Table:
    """The content of a tokenizer's tokenizer.json."""
    found: Table = json.loads(tokenizer.to_str())
    return found


def library(table: Table, specials: bool = False) -> tokenizers.Tokenizer:
    """The library's own tokenizer of a table, which is what decides."""
    made = tokenizers.Tokenizer.from_str(json.dumps(table))
    made.encode_special_tokens = not specials
    return made


def put(folder: Path, table: Table | None, settings: Table | None = None, **others: Any) -> Path:
    """Write a tokenizer's files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": table,
        "tokenizer_config.json": settings,
        **{f"{name}.json": value for name, value in others.items()},
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content, ensure_ascii=False))
    return folder


ALPHABET = (
    *" \n\t\r", " ", "\n", "  ", "\n\n", "a", "b", "the", " fox", "'s", "'LL", "12", "7", ".", ",", "!?", "(", "é", "e\u0301", "ß", "中", "文", "한", "й", "🦊",
    "👩‍👩‍👧", "\u00a0", "\u2003", "\u2028", "\x85", "\x1c", "\0", "\u200b", "\ufeff", "\ufffd", "\ufb01", "\uff21", "<s>", "</s>", "<unk>", BOS, TURN, "<|", "[PAD]", "<0x41>",
    "\u0301", "\U0010ffff", "x" * 30, "_", "\\",
)  # fmt: skip


def random_texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Random texts of words, signs, white space, rare characters and texts of special tokens."""
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(longest))) for _ in range(count)]


def long_text(seed: int, chars: int) -> str:
    """A random text of about so many characters."""
    return "".join(random_texts(chars // 30, seed))
