"""Errors that a user can cause, and how a command line ends on one."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right.

    The message is one line: the file or key, what was expected, what was found, what to do next.
    """


def quoted(value: object, limit: int = 80) -> str:
    """A value out of a file, fit to be shown: in ASCII, without control characters, cut at ``limit`` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's ``main``; a UserError ends it with one line on stderr and exit status 2.

    ``LLAMA_JAX_DEBUG=1`` in the environment shows the traceback instead.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`sample.py ... | head`): nothing is wrong, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        _stop(error, str(error))
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(error, f"{where}{error.strerror}; check the path, its permissions and the free disk space")


def _stop(error: Exception, message: str) -> None:
    if os.environ.get("LLAMA_JAX_DEBUG") == "1":
        raise error
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
