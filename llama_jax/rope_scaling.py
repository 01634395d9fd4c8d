"""The settings that scale a rotary embedding to longer contexts: their names, one spelling of them, and their check.

The names are those of config.json (transformers/modeling_rope_utils.py). ops/rotary.py computes what they say.
"""

import math
from typing import Any, Literal, cast

from llama_jax.errors import UserError, quoted

RopeKey = Literal[
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
]
RopeScaling = dict[RopeKey, float | str | bool]

ORIGINAL: RopeKey = "original_max_position_embeddings"
# Of each type: the keys that it must have, and those that it may have.
TYPES: dict[str, tuple[tuple[RopeKey, ...], tuple[RopeKey, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def depends_on_length(scaling: RopeScaling | None) -> bool:
    """Return whether the frequencies depend on the length of the text, as those of rope_type dynamic do."""
    return scaling is not None and scaling["rope_type"] == "dynamic"


def one_spelling(scaling: Any) -> Any:
    """Return settings with ``rope_type`` for the older ``type``, without nulls. None stands for no scaling.

    Numbers become floats, and lengths ints. What is no dict is returned as it is, for the check to refuse.
    """
    if not isinstance(scaling, dict):
        return scaling
    found = {key: value for key, value in scaling.items() if value is not None}
    older = found.pop("type", "default")
    kind = found.pop("rope_type", older)
    if kind == "default":
        return None
    for key, value in found.items():
        if type(value) is int and abs(value) < 1 << 53:
            found[key] = value = float(value)
        if key == ORIGINAL and isinstance(value, float) and value.is_integer():
            found[key] = int(value)
    return {"rope_type": kind} | found


def check_scaling(scaling: RopeScaling, name: str, head_width: int, theta: float) -> None:
    """Raise UserError if ops/rotary.py does not compute these settings, in the form of ``one_spelling``.

    name: the setting, for errors. head_width: the number of features per head. theta: the base of the wavelengths.
    """
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(f"{name}: expected a rope_type of default, {', '.join(TYPES)}, found {quoted(kind)}")
    needed, optional = TYPES[kind]
    for key in needed:
        if key not in scaling:
            raise UserError(f"{name}: expected {', '.join(needed)} beside rope_type {kind}, found no {key}")
    for key, value in scaling.items():
        if key not in ("rope_type", *needed, *optional):
            expected = ", ".join(needed + optional)
            raise UserError(f"{name}: expected {expected} beside rope_type {kind}, found {quoted(key)}; leave it out")
        if key != "rope_type" and (expected := _expected(key, value)):
            raise UserError(f"{name}: {key}: expected {expected}, found {quoted(value)}")
    if kind == "llama3" and cast(float, scaling["low_freq_factor"]) >= cast(float, scaling["high_freq_factor"]):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise UserError(f"{name}: high_freq_factor: expected more than low_freq_factor = {low}, found {high}")
    if kind == "dynamic" and head_width <= 2:
        raise UserError(f"{name}: expected heads of more than 2 features for rope_type dynamic, found {head_width}")
    if kind == "yarn" and theta <= 1:
        raise UserError(f"{name}: expected a rope_theta above 1 for rope_type yarn, found {theta:g}")


def _expected(key: str, value: object) -> str:
    """Return what values ``key`` takes, or "" if ``value`` is one of them."""
    if key == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    if key == ORIGINAL:
        return "" if type(value) is int and 0 < value < 1 << 31 else "a number of tokens, 1 or more"
    return "" if isinstance(value, float) and math.isfinite(value) and 0 < value < 1e9 else "a number above 0"
