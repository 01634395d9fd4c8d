"""Docstrings are sentences: those of functions open with a verb, and none opens with a fragment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT

FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "llama_jax").rglob("*.py"))
# A docstring that opens with one of these words lacks a subject, as "Of int [B, T] batches." does.
FRAGMENTS = {"As", "By", "From", "Like", "Likewise", "Of", "Same", "To", "What", "Where", "Which", "Who"}
# A function's docstring opens with what it does: "Return the sharding of int [B, T] batches." Add a verb that is missing.
VERBS = {
    "Add", "Answer", "Append", "Ask", "Assign", "Attend", "Build", "Check", "Choose", "Clear", "Close", "Compare", "Compile",
    "Compute", "Constrain", "Convert", "Copy", "Count", "Create", "Cut", "Decode", "Delete", "Describe", "Divide", "Do",
    "Draft", "Draw", "Drop", "Empty", "Encode", "Estimate", "Evaluate", "Execute", "Exit", "Expand", "Fetch", "Fill", "Find",
    "Free", "Gather", "Give", "Handle", "Import", "Join", "Keep", "Label", "Let", "Load", "Look", "Lower", "Make", "Map", "Mark",
    "Measure", "Move", "Multiply", "Name", "Note", "Open", "Own", "Parse", "Pass", "Plan", "Plot", "Prepare", "Print",
    "Process", "Quantize", "Raise", "Read", "Recognize", "Release", "Remove", "Reorder", "Replace", "Report", "Reshape",
    "Resolve", "Restore", "Return", "Rewrite", "Rotate", "Round", "Run", "Sample", "Save", "Say", "Score", "Search", "Send",
    "Set", "Shard", "Show", "Slice", "Sort", "Split", "Start", "Stop", "Store", "Sum", "Swap", "Take", "Tell", "Touch",
    "Trace", "Train", "Transpose", "Turn", "Undo", "Update", "Verify", "Wait", "Warn", "Watch", "Write", "Yield",
}  # fmt: skip
WIDTH = 120


def is_function(node: ast.AST) -> bool:
    """Whether a node is a function, other than a constructor or a property, which are described by nouns."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name == "__init__":
        return False
    decorators = {part.id if isinstance(part, ast.Name) else getattr(part, "attr", "") for part in node.decorator_list}
    return not decorators & {"property", "cached_property"}


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Constant]]:
    """The docstrings of modules, classes, functions and fields, each with the node that it stands in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield node, value


def faults(source: str) -> list[str]:
    """What is wrong with the docstrings of a file, by line."""
    found, lines = [], source.split("\n")
    for node, docstring in docstrings(ast.parse(source)):
        text, line = str(docstring.value), docstring.lineno
        first = text.split()[0].rstrip(".,:;") if text.strip() else ""
        if is_function(node) and first not in VERBS and not text.startswith("Not used"):
            found.append(f"{line}: expected a verb first, as in 'Return ...', found {text[:50]!r}")
        if not text.strip() or first in FRAGMENTS:
            found.append(f"{line}: expected a sentence, found {text[:50]!r}")
        if any(len(row) > WIDTH for row in lines[line - 1 : docstring.end_lineno]):
            found.append(f"{line}: expected up to {WIDTH} characters a line, found more")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_docstring_is_a_sentence(path: Path) -> None:
    assert not faults((ROOT / path).read_text())


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Of batches."""', 1),
        ('def f():\n    """Of int [B, T] batches."""', 2),
        ('def f():\n    """The sharding of batches."""', 2),
        ('class C:\n    x: int = 0\n    """Where it is."""', 3),
        ('@property\ndef f():\n    """As it is stored."""', 3),
        (f'"""A file.\n\n{"x" * 121}\n"""', 1),
    ],
)
def test_a_fragment_is_found(source: str, line: int) -> None:
    assert {fault.partition(":")[0] for fault in faults(source)} == {str(line)}


@pytest.mark.parametrize(
    "source",
    [
        '"""The sharding of batches."""',
        'def f():\n    """Return the sharding of int [B, T] batches."""',
        'class C:\n    """A batch."""\n\n    x: int = 0\n    """The number of rows."""',
        '@property\ndef f():\n    """The number of rows."""',
    ],
)
def test_a_sentence_is_taken(source: str) -> None:
    assert not faults(source)
