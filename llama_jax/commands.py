"""The commands, typed as ``llama-jax train``, ``python -m llama_jax train`` or, in a clone, ``python train.py``.

This module imports nothing slow, so that it can react at once to a signal, a missing package or a wrong command.
A command's docstring is its line in ``llama-jax --help``.
"""

import difflib
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence

import llama_jax
from llama_jax.cli.stopping import StopSignals
from llama_jax.errors import UserError, run_command
from llama_jax.programs import CONSOLE, typed


def train(argv: Sequence[str]) -> None:
    """Train a model from scratch on the built-in stories or on a text, or fine-tune one"""
    with StopSignals(at_exit=True) as signals:  # before the slow imports, so that it handles signals during them
        from llama_jax.recipe.one_step import read_with_recipe
        from llama_jax.training.loop import train

        config, notes = read_with_recipe(argv)
        train(config, signals, notes)


def sample(argv: Sequence[str]) -> None:
    """Run a trained model: complete prompts, or talk to a chat model"""
    importlib.import_module("llama_jax.sample").main(argv)


def convert(argv: Sequence[str]) -> None:
    """Convert weights from or to the files of Meta and Hugging Face, or quantize them"""
    importlib.import_module("llama_jax.convert.command").main(argv)


def evaluate(argv: Sequence[str]) -> None:
    """Print the loss of a text, or scores on tasks: multiple choice, answers, documents"""
    importlib.import_module("llama_jax.evaluate.__main__").main(argv)


def plan(argv: Sequence[str]) -> None:
    """Estimate whether a run fits a TPU slice, and how fast it can be"""
    importlib.import_module("llama_jax.plan.__main__").main(argv)


def recipe(argv: Sequence[str]) -> None:
    """Choose the settings of a run for a text and a time, tokens, FLOPs or parameters"""
    importlib.import_module("llama_jax.recipe.__main__").main(argv)


def data(argv: Sequence[str]) -> None:
    """Prepare the tokens of a text, inspect it, or train its vocabulary, before training"""
    importlib.import_module("llama_jax.data.__main__").main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    function.__name__: function for function in (train, sample, convert, evaluate, plan, recipe, data)
}


def run(command: str) -> None:
    """Run a command with the arguments of this process. ``run_command`` handles its errors."""
    run_command(lambda: COMMANDS[command](sys.argv[1:]))


def main() -> None:
    """Run the console command ``llama-jax``, whose first argument names a command."""
    run_command(lambda: _dispatch(sys.argv[1:]))


def _dispatch(argv: Sequence[str]) -> None:
    """Run the command that ``argv`` begins with. Raises UserError if it begins with none."""
    first = argv[0] if argv else "none"
    if first in COMMANDS:
        COMMANDS[first](argv[1:])
    elif first in ("--help", "-h"):
        print(_help())
    elif first == "--version":
        print(_version())
    else:
        close = difflib.get_close_matches(first, COMMANDS, 1)
        proposed = f"perhaps you meant {close[0]}" if close else f"`{_program()} --help` says what each does"
        raise UserError(f"{_program()}: expected a command, one of {', '.join(COMMANDS)}, found {first}; {proposed}")


def _program() -> str:
    """Return how this process was started: "llama-jax" or "python -m llama_jax"."""
    return typed("train").removesuffix(" train")


def _help() -> str:
    lines = [f"{typed(name):<{len(typed('evaluate'))}}  {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join([
        "LLaMA 2 in JAX and Flax: pretrain on any text, load official weights, generate.",
        "",
        *lines,
        "",
        f"`{typed('train')} --help` lists the flags of a command, `{_program()} --version` the versions.",
    ])  # fmt: skip


def _version() -> str:
    """Return the versions of the package, JAX and Python in one line."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "is not installed"
    return f"{CONSOLE} {llama_jax.__version__}, jax {jax}, Python {platform.python_version()}"
