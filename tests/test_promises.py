"""docs/promises.md names tests that exist."""

import ast
import re

from tests.commands import ROOT


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) > 50
    tests: dict[str, set[str]] = {}
    for path, name in named:
        if path not in tests:
            tree = ast.parse((ROOT / path).read_text())
            tests[path] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests[path], f"{path}::{name}"
