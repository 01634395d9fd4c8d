"""Reads and writes the rotary embedding in Hugging Face's config.json, by the rules of transformers.

The rules are those of RotaryEmbeddingConfigMixin (modeling_rope_utils.py): ``rope_scaling``, unless empty, replaces
``rope_parameters``. A theta in it replaces ``rope_theta`` at the top level.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.keys import is_same, take
from llama_jax.rope_scaling import ORIGINAL, TYPES, RopeScaling, check_scaling, one_spelling

NO_ROPE = "this project has no partial rotary embeddings, and none that differ between layers"
# Keys that transformers replaces by their defaults if they are 0.
DEFAULT_AT_0 = {"mscale", "mscale_all_dim", "beta_fast", "beta_slow"}


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of a config.json."""

    theta: float
    scaling: RopeScaling | None
    context: int
    """The number of tokens that the model is for, scaled."""
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    """Keys in it that have no meaning."""


def read_rope(table: dict[str, Any], path: Path, head_width: int, trained: int) -> Rope:
    """Read the rotary embedding of ``table``, the config.json at ``path``.

    head_width: the number of features per head. trained: the file's max_position_embeddings. Raises a UserError that
    names the key if ops/rotary.py does not compute the embedding.
    """
    key = "rope_scaling" if table.get("rope_scaling") else "rope_parameters"
    chosen = table.get(key) or {}
    if not isinstance(chosen, dict):
        raise UserError(f"{path}: {key}: expected an object or null, found {quoted(chosen)}")
    place = f"{path}: {key}"
    kind = chosen.get("rope_type", chosen.get("type", "default"))
    if not isinstance(kind, str) or kind not in ("default", *TYPES):
        raise UserError(f"{place}: rope_type: expected default, {', '.join(TYPES)}, found {quoted(kind)}")
    for name, value in chosen.items():
        if isinstance(value, dict):
            raise UserError(f"{place}: expected one rotary embedding for all layers, found {quoted(name)}; {NO_ROPE}")
    for where, values in ((str(path), table), (place, chosen)):
        partial = take(values, "partial_rotary_factor", float, where, 1.0)
        if partial != 1:
            raise UserError(f"{where}: partial_rotary_factor: expected 1, found {partial:g}; {NO_ROPE}")
    theta, warnings = _theta(table, chosen, key, path)
    if kind == "linear" and is_same(chosen.get("factor"), 1):
        scaling, known = None, {"factor"}
    else:
        scaling, known = _scaling(table, chosen, kind, path, key, trained)
    if scaling is not None:
        check_scaling(scaling, place, head_width, theta)
    known |= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(f"{key}.{name}" for name in chosen.keys() - known)
    return Rope(theta, scaling, _context(scaling, trained), tuple(warnings), tuple(unknown))


def write_rope(args: ModelArgs) -> dict[str, Any]:
    """Return the keys of config.json for a model's rotary embedding, as transformers 4 and 5 spell them."""
    scaling = dict(cast(dict[str, Any], args.rope_scaling or {}))
    trained = args.max_seq_len
    if scaling.get("rope_type") == "linear" and (args.max_seq_len / scaling["factor"]).is_integer():
        trained = int(args.max_seq_len / scaling["factor"])
    if scaling.get("rope_type") == "dynamic":  # transformers knows the original length by this key
        trained = scaling.pop(ORIGINAL, args.max_seq_len)
    elif scaling.get("rope_type") in ("llama3", "yarn"):
        scaling.setdefault(ORIGINAL, args.max_seq_len)
    return {
        "max_position_embeddings": trained,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": args.rope_theta},
    }


def _theta(table: dict[str, Any], chosen: dict[str, Any], key: str, path: Path) -> tuple[float, list[str]]:
    """Return the theta by transformers' rules, and warnings about values that are not used."""
    top = take(table, "rope_theta", float, path, None)
    inner = take(chosen, "rope_theta", float, f"{path}: {key}", None)
    theta = next((value for value in (inner, top) if value is not None), 10000.0)
    warnings = []
    if None not in (inner, top) and inner != top:
        warnings.append(
            f"config.json has rope_theta {top:g}, and {inner:g} in {key}: the second is used, as in transformers"
        )
    other = table.get("rope_parameters")
    if key == "rope_scaling" and other and _comparable(other, theta) != _comparable(chosen, theta):
        warnings.append(
            "config.json has rope_parameters and another rope_scaling: the second is used, as in transformers"
        )
    return theta, warnings


def _comparable(settings: Any, theta: float) -> Any:
    if not isinstance(settings, dict):
        return settings
    return (
        {"rope_theta": theta}
        | (one_spelling(settings) or {})
        | {k: v for k, v in settings.items() if k == "rope_theta"}
    )


def _scaling(
    table: dict[str, Any], chosen: dict[str, Any], kind: str, path: Path, key: str, trained: int
) -> tuple[RopeScaling | None, set[str]]:
    """Return the settings of a rope_type, with the original length that transformers takes, and the keys that count."""
    if kind == "default":
        return None, set()
    place, keys = f"{path}: {key}", {name for names in TYPES[kind] for name in names}
    found: dict[str, Any] = {"rope_type": kind}
    for name in sorted(keys - {ORIGINAL}):
        value = take(chosen, name, bool if name == "truncate" else float, place, None)
        if value is not None and not (value == 0 and name in DEFAULT_AT_0):
            found[name] = value
    if ORIGINAL in keys:
        own = take(chosen, ORIGINAL, int, place, trained)
        found[ORIGINAL] = trained if kind == "dynamic" else take(table, ORIGINAL, int, path, own)
    if kind == "yarn" and "factor" in chosen and "factor" not in found:
        found["factor"] = trained / max(found[ORIGINAL], 1)
    return found, keys - ({ORIGINAL} if kind == "dynamic" else set())  # type: ignore[return-value]


def _context(scaling: RopeScaling | None, trained: int) -> int:
    """Return the context of a model: that of training, and longer if the factor stretches it."""
    if scaling is None or scaling["rope_type"] == "llama3":
        return trained
    factor = float(scaling["factor"])
    original = int(scaling[ORIGINAL]) if scaling["rope_type"] == "yarn" else trained
    return max(trained, int(original * factor))
