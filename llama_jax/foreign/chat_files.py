"""Reads what Hugging Face's small files say about conversations: the chat template, and the tokens that end a text.

As transformers does: of the templates, chat_template.jinja wins over tokenizer_config.json, and of the end tokens,
generation_config.json over config.json.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_jax.chat.formats import ChatSetup, read_template_file, tokens_of
from llama_jax.chat.renderer import MOST_TEMPLATE
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.keys import read_json
from llama_jax.storage.locations import is_remote, location
from llama_jax.tokenizer import Tokenizer, clean
from llama_jax.tokenizers.names import CONFIG as SETTINGS
from llama_jax.tokenizers.names import MAP as TOKENS
from llama_jax.tokenizers.names import OWN_RULES, names_of
from llama_jax.words import SPACE_MARK

TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
MAX_JSON = 200_000_000
GENERATION, CONFIG = "generation_config.json", "config.json"
# Settings by which transformers' generate chooses other tokens, and the values at which they change nothing: those that
# count where it samples, and those that count always.
SAMPLING = {
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": 0,
}
CHOOSING = {
    "repetition_penalty": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": {}, "guidance_scale": 1, "min_length": 0,
    "min_new_tokens": 0, "num_beams": 1, "penalty_alpha": 0, "stop_strings": [], "max_new_tokens": None, "max_time": None,
    "num_return_sequences": 1, "exponential_decay_length_penalty": None, "force_words_ids": [], "constraints": [],
    "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "renormalize_logits": False, "dola_layers": None,
    "token_healing": False, "watermarking_config": None,
}  # fmt: skip
# Those that are flags of sample.py.
FLAGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens", "max_new_tokens")
# The tokens that end a turn in Meta's own code for LLaMA 3 (llama3/llama/tokenizer.py: stop_tokens).
METAS_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def read_chat(folder: Path, tokenizer: Tokenizer, rows: int, given: str = "") -> tuple[ChatSetup, list[str]]:
    """Return what the files in ``folder`` say about conversations, and warnings.

    rows: the number of embeddings, which end tokens must be among. given: the path of a tokenizer that is used in place
    of the folder's own. A template beside it counts where the folder has none.
    """
    warnings: list[str] = []
    template = _template(folder, warnings)
    beside = _beside(given, folder)
    if beside is not None and (other := _template(beside, [] if template else warnings)) and other != template:
        used = f"{folder}, which is kept" if template else f"{beside}, where the tokenizer is, since {folder} has none"
        warnings.append(f"the chat template is that of {used}; --chat-template takes another")
        template = template or other
    ends = _end_ids(folder, rows, warnings)
    warnings += _sampling(folder)
    if template and _json((beside or folder) / SETTINGS).get("split_special_tokens") is True:
        warnings.append(
            f"{SETTINGS} says split_special_tokens: transformers takes the special tokens of the chat template for text, this "
            "project for tokens"
        )
    warnings += _marks_behind_specials(beside or folder, tokenizer, template)
    tokens = tokens_of(tokenizer)
    theirs = names_of({name: _json((beside or folder) / name) for name in (SETTINGS, TOKENS)}, tokens)
    plain = not ends or ends == (tokenizer.eos_id,)
    return ChatSetup(template, () if plain else ends, {} if theirs == tokens else theirs, not template), warnings


def defaults_taken(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return a line about each thing that the files in ``folder`` do not say, and that has another default here.

    These are the end tokens, and whether transformers' generate samples.
    """
    lines = []
    if not any(_json(folder / name).get("eos_token_id") is not None for name in (GENERATION, CONFIG)):
        end = f"{quoted(tokenizer.piece(tokenizer.eos_id))}, the tokenizer's EOS ({tokenizer.eos_id})"
        lines.append(f"{CONFIG} and {GENERATION} have no eos_token_id; completions end with {end}")
    if (folder / GENERATION).is_file() and _json(folder / GENERATION).get("do_sample") is not True:
        lines.append(
            f"{GENERATION} does not ask for sampling (do_sample), so that transformers' generate takes the likeliest token; here "
            "tokens are sampled, unless --temperature is 0"
        )
    return lines


def metas_chat(folder: Path, tokenizer: Tokenizer, rows: int, given: str = "") -> tuple[ChatSetup, list[str]]:
    """Return the end tokens of Meta's own code, which has no files about them, and a template if a file has one.

    The arguments are those of ``read_chat``.
    """
    ends = tuple(tokenizer.specials[text] for text in METAS_ENDS if text in tokenizer.specials)
    found, warnings = read_chat(folder, tokenizer, rows, given)
    if found.template:
        return replace(found, end_ids=found.end_ids or (ends if len(ends) > 1 else ())), warnings
    return ChatSetup(end_ids=ends if len(ends) > 1 else ()), []


def _beside(given: str, folder: Path) -> Path | None:
    """Return the folder of a tokenizer that is given, or None if there is none or it is that of the weights."""
    if not given or is_remote(place := location(given)):
        return None
    place = place if place.is_dir() else place.parent
    return None if place.resolve() == folder.resolve() else place


def _template(folder: Path, warnings: list[str]) -> str:
    """Return the chat template of a folder, or "" if it has none."""
    more = folder / MORE_TEMPLATES
    names = sorted(path.stem for path in more.glob("*.jinja") if path.stem != "default") if more.is_dir() else []
    if names:
        named = ", ".join(quoted(name, 30) for name in names[:4])
        warnings.append(f"{MORE_TEMPLATES}: {named}: only the default chat template is kept")
    found = [(name, text) for name, text in _templates(folder, warnings) if text.strip()]
    if len({text for _, text in found}) > 1:
        others = " and ".join(name for name, text in found[1:] if text != found[0][1])
        warnings.append(f"{found[0][0]} is kept, as by transformers; {others} has another chat template")
    return found[0][1] if found else ""


def _templates(folder: Path, warnings: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the files that have a chat template, in the order in which transformers takes them, and the template."""
    for name in (f"{MORE_TEMPLATES}/default.jinja", TEMPLATE):
        if (folder / name).is_file():
            yield name, read_template_file(folder / name)
    for name in (SETTINGS, OLD_TEMPLATE):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):
            found = _default(found, name, warnings)
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and len(found) > MOST_TEMPLATE:
            warnings.append(f"{name}: chat_template: {len(found):,} characters are too many, and are not kept")
        elif isinstance(found, str) and found == clean(found):
            yield name, found
        elif found is not None:
            warnings.append(f"{name}: chat_template: expected a text, found {quoted(found, 40)}: it is not kept")


def _default(found: list[Any], name: str, warnings: list[str]) -> str | None:
    """Return the default one of several named templates."""
    named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    others = ", ".join(quoted(key, 30) for key in named if key != "default")
    if others:
        kept = "only the default one is kept" if "default" in named else "none is the default, and none is kept"
        warnings.append(f"{name}: chat_template has {others}: {kept}")
    return named.get("default")


def _end_ids(folder: Path, rows: int, warnings: list[str]) -> tuple[int, ...]:
    """Return the ids that end a text, or none if the files do not say."""
    for name in (GENERATION, CONFIG):
        found = _json(folder / name).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        ids = [i for i in listed if type(i) is int and 0 <= i < rows]
        if len(ids) < len(listed):
            warnings.append(
                f"{name}: eos_token_id {quoted(found, 40)}: ids that are not of the model's {rows:,} tokens are left out"
            )
        if ids:
            if name == CONFIG and (folder / GENERATION).is_file():
                warnings.append(
                    f"{GENERATION} has no eos_token_id, so that transformers' generate never ends; completions end with that of {CONFIG}"
                )
            return tuple(dict.fromkeys(ids))
    return ()


def _sampling(folder: Path) -> Iterator[str]:
    """Yield which settings of generation the files have that are not this project's defaults: here flags decide."""
    name = GENERATION if (folder / GENERATION).is_file() else CONFIG
    table = _json(folder / name)
    counting = CHOOSING | (SAMPLING if table.get("do_sample") is True else {})
    context, most = _json(folder / CONFIG).get("max_position_embeddings"), table.get("max_length")
    # The context ends a text as well. 20 is the default, which old files spell out.
    if type(context) is int and type(most) is int and 20 != most < context:
        counting = counting | {"max_length": None}
    here = SampleArgs()
    found = [
        key for key, neutral in counting.items() if table.get(key) not in (None, neutral, getattr(here, key, neutral))
    ]
    if found:
        shown = ", ".join(f"{key} {quoted(table[key], 20)}" for key in found)
        flags = [
            f"--{key.replace('_', '-')} {table[key]}"
            for key in found
            if key in FLAGS and type(table[key]) in (int, float)
        ]
        yield f"{name} has {shown}, which transformers' generate takes by itself; here flags decide" + (
            f": {' '.join(flags)}" if flags else ""
        )


def _marks_behind_specials(folder: Path, tokenizer: Tokenizer, template: str) -> list[str]:
    """Return a line if text behind a special token of the template has other space marks in transformers 5 than here.

    Its LlamaTokenizer has a rule of its own, whatever tokenizer.json says: no mark, or with ``legacy`` one.
    """
    if "_token" not in template and not any(text in template for text in tokenizer.specials):
        return []
    settings = _json(folder / SETTINGS)
    kind, special = settings.get("tokenizer_class", OWN_RULES[0]), tokenizer.piece(tokenizer.bos_id)
    marked = tokenizer.encode("a", bos=False)
    if (
        kind not in OWN_RULES
        or special not in tokenizer.specials
        or not tokenizer.piece(marked[0]).startswith(SPACE_MARK)
    ):
        return []
    behind, spaced = (tokenizer.encode(special + text, bos=False, specials=True)[1:] for text in ("a", " a"))
    anew = settings.get("legacy") is True
    if (behind == marked) is anew and spaced == marked:
        return []
    if (behind == marked) is anew:
        theirs, ours = "one space mark before it where it begins with a space", "there are two"
    else:
        theirs, ours = ("a space mark", "there is none") if anew else ("no space mark", "there is one")
        theirs += " before it"
    return [
        f"text behind a special token of the chat template: by tokenizer_class {kind}, transformers 5 puts {theirs}; here {ours}, as "
        "the tokenizer's files and earlier versions have it"
    ]


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or {} if there is none or it cannot be read, which others tell."""
    try:
        return read_json(path, MAX_JSON)
    except UserError:
        return {}
