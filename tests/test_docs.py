"""The README and the pages of docs/: what they name exists, and what they quote is said."""

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_jax import errors
from llama_jax.errors import UserError
from llama_jax.foreign import config_json, params_json
from llama_jax.foreign.config_json import read_config
from tests.commands import ROOT
from tests.families import FAMILIES

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PLAIN: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 400,
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
        assert page.parent != DOCS or other.parent == DOCS, f"{target}: the site has the pages of docs/ alone"


def test_the_sites_navigation_has_every_page_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for child in (entry.values() if isinstance(entry, dict) else entry) for page in pages(child)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_readme_is_the_first_screen_and_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def literals(node: ast.AST) -> str:
    """A string of the source; what is filled in is … ."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literals(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


@functools.cache
def said() -> list[str]:
    """Every string of the package."""
    files = (ROOT / "llama_jax").rglob("*.py")
    return [text for path in files for node in ast.walk(ast.parse(path.read_text())) if (text := literals(node))]


def quoted_messages(page: str) -> list[str]:
    """The messages of this project in the first columns of the tables of errors."""
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", (DOCS / page).read_text().split("## Installing")[-1], re.MULTILINE)
    rows = [row for row in rows if "(of JAX" not in row and "No matching distribution" not in row]
    return [message for row in rows for message in re.findall(r"`([^`]{8,})`", row)]


def test_every_message_that_troubleshooting_explains_is_one_that_is_said() -> None:
    messages = quoted_messages("troubleshooting.md")
    assert len(messages) > 30
    for message in messages:
        pattern = re.escape(message).replace(re.escape("..."), ".*")
        assert any(re.search(pattern, text) for text in said()), message


def test_the_exit_statuses_are_those_of_the_code() -> None:
    table = (DOCS / "troubleshooting.md").read_text().split("## Exit statuses")[1].split("##")[0]
    listed = set(map(int, re.findall(r"^\| (\d+) \|", table, re.MULTILINE)))
    assert {0, 1, errors.WRONG, errors.STOPPED, errors.LOST, errors.INTERRUPTED, 141} <= listed


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, None),
        ({"rope_theta": 1e6}, None),  # Code Llama
        ({"some_new_key": 3}, None),  # listed
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),  # Vicuna with 16,384 tokens
        ({"attention_bias": True, "mlp_bias": True}, None),
        ({"head_dim": 32}, None),
        ({"tie_word_embeddings": True}, None),
        ({"model_type": "mistral", "num_key_value_heads": 2}, None),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 64}, None),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 64, "max_window_layers": 1},
            "max_window_layers",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling"),  # Phi
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"model_type": "gemma"}, "model_type"),
        ({"num_local_experts": 8}, "num_local_experts"),  # Mixtral
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
    ids=str,
)
def test_a_model_family_is_taken_or_refused_as_the_support_table_says(
    change: dict[str, Any], refused: str | None, tmp_path: Path
) -> None:
    if refused is None:
        config = read_config(PLAIN | change, tmp_path / "config.json", 0)
        assert config.unknown == (("some_new_key",) if "some_new_key" in change else ())
    else:
        with pytest.raises(UserError, match=rf"config\.json: {refused}"):
            read_config(PLAIN | change, tmp_path / "config.json", 0)


def test_every_key_that_the_support_table_names_is_one_that_decides() -> None:
    table = (DOCS / "support.md").read_text().split("## Model families")[1].split("##")[0]
    known = {*config_json.READ, *config_json.NEUTRAL, *params_json.READ, *params_json.NEUTRAL}
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", table))
    assert {"model_type", "rope_scaling", "use_scaled_rope", "vision_args", "num_local_experts"} <= named <= known


def test_the_families_are_those_that_are_tested() -> None:
    page = (DOCS / "families.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", page.split("For each row")[0], re.MULTILINE)
    named = ", ".join(row.replace(", and ", ", ") for row in rows[1:])
    assert set(re.split(r", ", named)) == set(FAMILIES)


def test_every_key_that_the_page_of_families_refuses_is_one_that_decides() -> None:
    table = (DOCS / "families.md").read_text().split("## What is refused")[1]
    known = {*config_json.READ, *config_json.NEUTRAL, *params_json.READ, *params_json.NEUTRAL, *config_json.IGNORED}
    assert {"qk_norm", "pretraining_tp"} <= set(re.findall(r"`([a-z]+_[a-z_]+)`", table)) <= known
