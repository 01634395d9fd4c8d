"""Runs a function in a process of its own, which the TPU's compiler may end.

libtpu aborts its process on a slice that it does not know, and hears no Ctrl-C while it compiles.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar, cast

from llama_jax.compat.jax_internals import failed_check
from llama_jax.errors import UserError

T = TypeVar("T")

# The only way for what is compiled to be a closure, and not to import JAX again. Nothing may have started JAX's backends before.
_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h: a signal that the kernel sends a process when its parent dies
_SECONDS = 0.5


class CompilerError(Exception):
    """The TPU's compiler failed, or ended its process; the message is what it said."""


class Bug(Exception):
    """Something that should not happen happened in the other process; the message is its traceback."""


def run_apart(
    function: Callable[[Callable[[], None]], T],
    begun: Callable[[], None] = lambda: None,
    beat: Callable[[float], None] = lambda _: None,
) -> T:
    """The result of ``function``, which runs in a fork of this process.

    function: called with what it calls when all is checked and the long work begins; ``begun`` is called here then, and ``beat``,
    now and then, with the seconds so far. Raises UserError and CompilerError as ``function`` does, CompilerError where its process
    dies, UserError where memory is too small, and Bug for all else.
    """
    reader, writer = _FORK.Pipe(duplex=False)
    began = time.monotonic()
    _flush()
    with tempfile.TemporaryFile() as said, reader:
        process = _FORK.Process(target=_run, args=(function, writer, said, os.getpid()))
        process.start()
        writer.close()
        try:
            while True:
                while not reader.poll(_SECONDS):
                    beat(time.monotonic() - began)
                kind, value = reader.recv()
                if kind != "begun":
                    break
                begun()
        except EOFError:
            process.join()
            kind, value = "died", process.exitcode
        finally:
            process.kill()
            process.join()
        said.seek(0)
        words = said.read().decode(errors="replace")
    if os.environ.get("LLAMA_JAX_DEBUG") == "1" and words:
        print(words, file=sys.stderr)
    if kind == "made":
        return cast(T, value)
    raise _error(kind, value, words)


def _flush() -> None:
    """Empty the buffers that a fork would have a copy of."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: closed at the start
            stream.flush()


def _error(kind: str, value: Any, words: str) -> BaseException:
    if kind == "user":
        return UserError(value)
    if kind == "memory" or (kind == "died" and value == -signal.SIGKILL):
        return UserError(
            "plan: expected memory for the compiler, up to 4 GB for a large model, found too little: its process was killed; "
            "end other programs, or plan on another machine"
        )
    if kind == "bug":
        return Bug(value)
    return CompilerError(value if kind == "compiler" else _last_words(words, value))


def _last_words(words: str, status: int) -> str:
    """Why the compiler ended its process: the check that failed, or how the process ended."""
    return failed_check(words) or f"its process ended with status {status}"


def _run(function: Callable[[Callable[[], None]], Any], writer: Connection, said: IO[bytes], parent: int) -> None:
    """The other process: hand over what ``function`` returns or raises; what is printed goes into the file ``said``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    with contextlib.suppress(ValueError, OSError):  # an abort of the compiler need leave no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    writer.send_bytes(_outcome(lambda: function(lambda: writer.send(("begun", None)))))
    os._exit(0)  # libtpu's threads would be waited for


def _outcome(function: Callable[[], Any]) -> bytes:
    """What ``_error`` and ``run_apart`` read: a kind and a value, pickled."""
    try:
        return pickle.dumps(("made", function()))
    except UserError as error:
        kind, value = "user", str(error)
    except CompilerError as error:
        kind, value = "compiler", str(error)
    except MemoryError:
        kind, value = "memory", ""
    except BaseException:
        kind, value = "bug", traceback.format_exc()
    return pickle.dumps((kind, value))
