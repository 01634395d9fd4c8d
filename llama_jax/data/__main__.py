"""The commands about texts: ``python -m llama_jax.data prepare``, ``merge``, ``inspect`` and ``train-tokenizer``."""

import re
import sys
from collections.abc import Callable, Sequence

from llama_jax.cli.flags import texts_given_twice
from llama_jax.data import inspecting, merging, preparing, training_tokenizer
from llama_jax.errors import UserError, run_command
from llama_jax.programs import typed

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "prepare": ("Encode a text once, into a folder that training takes for a text", preparing.main),
    "merge": ("Join the parts that prepare --part made of a text", merging.main),
    "inspect": ("Say what a text or a corpus holds, and what looks wrong with it", inspecting.main),
    "train-tokenizer": ("Train a vocabulary on a text or a corpus", training_tokenizer.main),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, which begins with a command. None: that of this process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "none"
    if name in ("--help", "-h"):
        print(_help())
        return
    if name not in COMMANDS:
        raise UserError(
            f"llama_jax.data: expected a command, one of {', '.join(COMMANDS)}, found {name}; "
            f"`{typed('data')} --help` says what each does"
        )
    try:
        # The names that training has for the same flags are taken, too.
        COMMANDS[name][1]([re.sub(r"^--data\.", "--", word) for word in argv[1:]])
        if warning := texts_given_twice(argv):
            print(warning, file=sys.stderr)
    except UserError as error:
        hint = "; several texts are a folder or a glob in quotes" if "expected a flag before it" in str(error) else ""
        raise UserError(str(error).replace("--data.", "--") + hint) from error


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"{typed('data')} {name:<{width}}  {does}" for name, (does, _) in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{typed('data')} prepare --help` lists the flags of a command."])


if __name__ == "__main__":
    run_command(main)
