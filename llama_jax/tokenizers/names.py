"""The special tokens that the files next to a vocabulary name, by the rules of transformers.

special_tokens_map.json wins over tokenizer_config.json unless the latter lists added tokens (added_tokens_decoder):
then transformers does not read the former (PreTrainedTokenizerBase, ``_from_pretrained``).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.tokenizers.reader import clean

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
DECODER, EXTRA = "added_tokens_decoder", "extra_special_tokens"
# Classes of transformers that give a name no token by themselves. Others have LLaMA's.
PLAIN_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")

# The class that makes its own rules of spaces in transformers 5, whatever tokenizer.json has. It is also LLaMA's default.
OWN_RULES = ("LlamaTokenizer", "LlamaTokenizerFast")


def text_of(token: Any) -> str | None:
    """Return the text of a token that a file names, by itself or with flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return clean(found) if isinstance(found, str) else None


def order_of(tables: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Return the two files that name special tokens, the one that wins first."""
    return (CONFIG, MAP) if DECODER in tables.get(CONFIG, {}) else (MAP, CONFIG)


def names_of(tables: Mapping[str, Mapping[str, Any]], own: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of special tokens by the names that a chat template knows them by, such as bos_token.

    tables: the files, by name. own: those of the vocabulary, which count where transformers' class has such tokens by
    itself. A name that a file has as null, or that stands nowhere, has no token.
    """
    config = tables.get(CONFIG, {})
    read = [CONFIG] if DECODER in config else [CONFIG, MAP]
    kind = config.get("tokenizer_class")
    found: dict[str, Any] = {} if kind in PLAIN_CLASSES else dict(own)
    for name in read:
        table = tables.get(name, {})
        found |= {key: value for key, value in table.items() if key.endswith("_token")}
        extra = table.get(EXTRA)
        found |= extra if isinstance(extra, dict) else {}
    texts = {key: text_of(value) for key, value in found.items()}
    return {key: text for key, text in texts.items() if text is not None}


def texts_in(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that a table names as BOS, EOS, PAD and the like."""
    for key, value in table.items():
        if key.endswith("_token") and (text := text_of(value)):
            yield text
    yield from listed_texts(table)


def listed_texts(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a table's special tokens without a name of their own, and of those that it adds by name."""
    for key in ("additional_special_tokens", EXTRA):
        listed = table.get(key)
        values = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
        yield from filter(None, map(text_of, values))
