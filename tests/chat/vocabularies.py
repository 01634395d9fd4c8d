"""Small vocabularies with the special tokens of published chat models, as this project and transformers read them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Table
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Who are you? I am an owl by the river. Be brief, please.",
    "user assistant system Why is the sky blue? <b>bold</b> [x] | a > b / c",
]
LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
CHATML = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
ODD = ("<s>", "</s>", "STOP", "[turn]", "<｜end▁of▁turn｜>")  # noqa: RUF001


class Vocabulary:
    """A tokenizer with the names that this project's have, by the library ``tokenizers``."""

    def __init__(self, specials: Sequence[str], ordinary: Sequence[str] = ()):
        self._table = byte_level(specials, ordinary)
        self.specials = {text: self._table.token_to_id(text) for text in (*specials, *ordinary)}
        self._ordinary = {self.specials[text] for text in ordinary}
        self.vocab_size = self._table.get_vocab_size()
        self.bos_id, self.eos_id, self.unk_id = self.specials[specials[0]], self.specials[specials[1]], -1
        self.transformers: Any = PreTrainedTokenizerFast(
            tokenizer_object=self._table, bos_token=specials[0], eos_token=specials[1]
        )

    def piece(self, token_id: int) -> str:
        return self._table.id_to_token(token_id)

    divides = True

    def is_text(self, token_id: int) -> bool:
        return token_id in self._ordinary or token_id not in self.specials.values()

    def encode(self, text: str, bos: bool = True, eos: bool = False, specials: bool = False) -> list[int]:
        self._table.encode_special_tokens = not specials
        ids = self._table.encode(text, add_special_tokens=False).ids
        self._table.encode_special_tokens = False
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_parts(self, parts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        return [self.encode(part, bos=False) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._table.decode(list(ids), skip_special_tokens=False)


def byte_level(specials: Sequence[str], ordinary: Sequence[str] = ()) -> Table:
    """A byte-level vocabulary, as LLaMA 3 has."""
    table = Table(models.BPE())
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    table.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    table.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    table.add_tokens([AddedToken(text, special=False, normalized=False) for text in ordinary])
    return table


def spaced(specials: Sequence[str], scheme: str) -> Table:
    """A vocabulary that marks spaces, as LLaMA 2's tokenizer.json: "always" before a text, or "first" before the first."""
    table = Table(models.BPE(byte_fallback=True, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    table.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = ["\n", *map(chr, range(32, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    table.train_from_iterator(TEXTS, trainer)
    table.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return table


def write(table: Table, folder: Path, bos: str, eos: str) -> Path:
    """Write a vocabulary as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    table.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
