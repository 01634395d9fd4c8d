"""Errors that a user can fix, and how a command ends on them."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from llama_jax.compat import jax_internals, orbax_internals
from llama_jax.programs import install_command

# Exit statuses besides 0 (done) and 1 (a plan that does not fit).
WRONG = 2  # the user can fix it; one line on stderr says how
STOPPED = 75  # a run was ended by SIGTERM or SIGHUP, and saved; EX_TEMPFAIL in sysexits.h
LOST = 76  # a run hung, or lost a process of its job
INTERRUPTED = 130  # Ctrl-C; the status that shells use

CHECK_DISK = "check the path, its permissions and the free disk space"


class UserError(Exception):
    """An error that the user can fix.

    Its message is one line: the file or key, what was expected, what was found and what to do next.
    """

    status = WRONG


class LostProcess(UserError):
    """Another process of the job is gone. Restart the job to resume from its last checkpoint."""

    status = LOST


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error, or any error that caused it, says that another process of the job is gone."""
    lost = jax_internals.LOST_PROCESS + orbax_internals.LOST_PROCESS
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LostProcess) or any(words in str(seen) for words in lost):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def lost_process(error: BaseException) -> LostProcess:
    """Return the error to raise in place of ``error``, for which ``is_lost_process`` is true."""
    reason = " ".join(str(error).split())[:160]
    return LostProcess(
        f"distributed: expected all processes of the job to go on, found that this one lost another ({reason}); "
        "see its output, then restart the job, which resumes from its last checkpoint"
    )


def quoted(value: object, limit: int = 80) -> str:
    """Return a value read from a file as printable ASCII, cut to ``limit`` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_command(main: Callable[[], None]) -> None:
    """Run the ``main`` function of a command. On an error that the user can fix, print one line to stderr and exit.

    The exit status is the error's (2 for most). Set ``LLAMA_JAX_DEBUG=1`` in the environment to see the traceback.
    It decides how libraries log in the process.
    """
    sys.unraisablehook = _on_unraisable
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if the command was started with the stream closed
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone (`sample.py ... | head`). That is no fault, so exit quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        _stop(None, "stopped by Ctrl-C", INTERRUPTED)
    except UserError as error:
        _stop(error, f"error: {error}", error.status)
    except MemoryError as error:
        _stop(
            error,
            "error: expected enough memory, found too little; make the model, the batch or the context smaller",
            WRONG,
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "llama_jax":
            raise
        # A package that looks for another one may say so in words alone.
        missing = f"{package}: expected to be installed, found none" if package else str(error)
        _stop(error, f"error: {missing}; {install_command()} installs all", WRONG)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(error, f"error: {where}{error.strerror}; {CHECK_DISK}", WRONG)
    except Exception as error:
        if not (code := orbax_internals.system_error(str(error))):
            raise
        _stop(error, f"error: {os.strerror(code)}; {CHECK_DISK}", WRONG)


def _quiet_libraries() -> None:
    """Stop libraries from logging the errors that they also raise, because the command reports those in one line."""
    # orbax logs the first error of a save, with its traceback, through absl. It leaves futures unread, whose errors asyncio
    # logs when the process ends. gcsfs also logs at each call that it does not know the kind of bucket, which is harmless.
    with contextlib.suppress(ImportError):
        import absl.logging  # noqa: F401  # it must be imported first, because its logger has its own class
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Without this, TensorFlow would replace gcsfs if it is installed (storage/locations.py). It is read once, at the first path.
    os.environ.setdefault("EPATH_USE_TF", "false")


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Exit on Ctrl-C inside a garbage collector callback, where Python only prints it.

    Drop one known follow-up error.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _stop(None, "stopped by Ctrl-C", INTERRUPTED)
    if not orbax_internals.is_echo(str(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def _stop(error: Exception | None, message: str, status: int) -> NoReturn:
    if error is not None and os.environ.get("LLAMA_JAX_DEBUG") == "1":
        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # a full disk
        if sys.stdout is not None:
            sys.stdout.flush()
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    # Not sys.exit: threads of libraries that are still running would report the same fault again, or crash.
    os._exit(status)
