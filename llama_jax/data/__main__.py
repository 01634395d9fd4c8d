"""The commands of ``python -m llama_jax.data``: prepare and merge."""

import sys
from collections.abc import Callable, Sequence

from llama_jax.data import merging, preparing
from llama_jax.errors import UserError, run_command
from llama_jax.programs import typed

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"prepare": preparing.main, "merge": merging.main}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``. None: that of this process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"]):
        print("\n".join([f"Tokens of a text, ahead of training: {typed('data')} COMMAND --help", "", *_lines()]))
        return
    if not argv or argv[0] not in COMMANDS:
        raise UserError(
            f"llama_jax.data: expected a command, one of {', '.join(COMMANDS)}, found {' '.join(argv[:1]) or 'none'}"
        )
    COMMANDS[argv[0]](argv[1:])


def _lines() -> list[str]:
    width = max(map(len, COMMANDS))
    return [f"{name:<{width}}  {(command.__doc__ or '').partition('.')[0]}" for name, command in COMMANDS.items()]


if __name__ == "__main__":
    run_command(main)
