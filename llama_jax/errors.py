"""Errors that a user can cause, and how a command line ends on one."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from llama_jax.cli.programs import install_command
from llama_jax.compat import jax_internals, orbax_internals

# How a command ends, besides 0 (done) and 1 (a plan that does not fit).
WRONG = 2  # the user can put it right; one line on stderr says how
STOPPED = 75  # SIGTERM or SIGHUP ended a run, saved; EX_TEMPFAIL of sysexits.h
LOST = 76  # a run hung, or a process of its job was lost
INTERRUPTED = 130  # Ctrl-C, as shells have it


class UserError(Exception):
    """Something the user can put right.

    The message is one line: the file or key, what was expected, what was found, what to do next.
    """

    status = WRONG


class LostProcess(UserError):
    """Another process of the job has gone: the same job, started again, goes on from its last checkpoint."""

    status = LOST


def is_lost_process(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that another process of the job has gone."""
    lost = jax_internals.LOST_PROCESS + orbax_internals.LOST_PROCESS
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LostProcess) or any(words in str(seen) for words in lost):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def lost_process(error: BaseException) -> LostProcess:
    """The error to raise where ``is_lost_process``."""
    reason = " ".join(str(error).split())[:160]
    return LostProcess(
        f"distributed: expected all processes of the job to go on, found that this one lost another ({reason}); "
        "see what that one says, then start all again: the run goes on from its last checkpoint"
    )


def quoted(value: object, limit: int = 80) -> str:
    """A value out of a file, fit to be shown: in ASCII, without control characters, cut at ``limit`` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's ``main``; a UserError ends it with one line on stderr and exit status 2.

    ``LLAMA_JAX_DEBUG=1`` in the environment shows the traceback before it. The process is the command's own: it says how
    libraries log in it.
    """
    sys.unraisablehook = _on_unraisable
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None, where the command was started with it closed
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`sample.py ... | head`): nothing is wrong, and nobody is left to tell.
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
        if package in ("", "llama_jax"):
            raise
        _stop(error, f"error: {package}: expected to be installed, found none; {install_command()} installs all", WRONG)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(error, f"error: {where}{error.strerror}; check the path, its permissions and the free disk space", WRONG)


def _quiet_libraries() -> None:
    """Have libraries not log what they raise as well, as the command tells it in one line."""
    # orbax logs the first error of a save, traceback and all, by absl; the futures that it leaves unread, asyncio would log as
    # the process ends. gcsfs also logs at every call that it was not told what kind of bucket it is, which does not matter.
    with contextlib.suppress(ImportError):
        import absl.logging  # noqa: F401  # whose logger is of a class of its own
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Read once, at the first path: TensorFlow, where it is installed, would take the place of gcsfs (storage/locations.py).
    os.environ.setdefault("EPATH_USE_TF", "false")


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Heed a Ctrl-C within a callback of the garbage collector, where Python would only mention it; not the echo of errors."""
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
    # Not sys.exit: libraries' threads, still at work, would go on to speak of the same fault, or crash in the ruins.
    os._exit(status)
