"""Runs a function in a separate process, which the TPU's compiler may abort.

libtpu aborts its process on a slice that it does not know, and ignores Ctrl-C while it compiles.
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

from llama_jax.compat.jax_internals import failed_check, has_started
from llama_jax.errors import UserError

T = TypeVar("T")

# Only a fork can run a closure without importing JAX again.
_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h: the kernel sends a process this signal when its parent dies
_SECONDS = 0.5


class CompilerError(Exception):
    """The TPU's compiler failed or aborted its process. The message is what it said."""


class Bug(Exception):
    """An unexpected error in the other process. The message is its traceback."""


def run_apart(
    function: Callable[[Callable[[], None]], T],
    begun: Callable[[], None] = lambda: None,
    beat: Callable[[float], None] = lambda _: None,
) -> T:
    """Run ``function`` in a fork of this process and return its result.

    Arguments:
        function: is called with a function that it calls when all is checked and the long work begins.
        begun: is called here at that moment.
        beat: is called here repeatedly with the seconds so far.

    Raises UserError and CompilerError like ``function``, CompilerError if its process dies, UserError if memory runs
    out, and Bug on any other error. Raises RuntimeError if JAX's backends have started here, since the fork could hang.
    """
    if has_started():
        raise RuntimeError(
            "run_apart: expected that JAX's backends have not started in this process, found that they have"
        )
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
    """Empty the buffers that a fork would copy."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if it was closed at the start
            stream.flush()


def _error(kind: str, value: Any, words: str) -> BaseException:
    if kind == "user":
        return UserError(value)
    if kind == "memory" or (kind == "died" and value == -signal.SIGKILL):
        return UserError(
            "plan: expected memory for the compiler, up to 4 GB for a large model, found too little: its process was killed; "
            "close other programs, or plan on another machine"
        )
    if kind == "bug":
        return Bug(value)
    return CompilerError(value if kind == "compiler" else _last_words(words, value))


def _last_words(words: str, status: int) -> str:
    """Return why the compiler aborted: the check that failed, or the exit status."""
    return failed_check(words) or f"its process ended with status {status}"


def _run(function: Callable[[Callable[[], None]], Any], writer: Connection, said: IO[bytes], parent: int) -> None:
    """Send the result or error of ``function``, in the other process. Its output goes to the file ``said``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    with contextlib.suppress(ValueError, OSError):  # no core file if the compiler aborts
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    writer.send_bytes(_outcome(lambda: function(lambda: writer.send(("begun", None)))))
    os._exit(0)  # a normal exit would wait for libtpu's threads


def _outcome(function: Callable[[], Any]) -> bytes:
    """Return a pickled kind and value, which ``run_apart`` and ``_error`` interpret."""
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
