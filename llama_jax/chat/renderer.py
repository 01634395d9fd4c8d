"""Renders chat templates in a process apart (sandbox.py), which is started once and used again."""

import atexit
import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import UserError, quoted

# Seconds to wait for the process to start and for an answer, on a machine that does other things as well. The process
# itself ends after fewer seconds of work (sandbox.MOST_SECONDS).
START_SECONDS, ANSWER_SECONDS = 60.0, 6.0
# Characters of a template. The longest that are published have 20 thousand.
MOST_TEMPLATE = 200_000
# A prompt may have this many characters, and this many for each that the template and the conversation have.
MOST_TEXT, MOST_SHARE = 100_000, 8
# Conversations that are rendered together have about this many characters.
TOGETHER = 1 << 19
# What a process needs of this one's environment to start: where its libraries are, and the time zone.
ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "TZ", "SYSTEMROOT")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """The beginnings and ends of the parts in {% generation %}, which an assistant says."""


def render(template: str, variables: dict[str, Any], name: str) -> Rendered:
    """Return ``template`` rendered with ``variables``, which are what JSON can hold.

    ``name`` is that of the template in errors. Raises UserError, in the template's own words if it refuses the
    conversation, and if it does anything else than to write a prompt in a reasonable time.
    """
    if len(template) > MOST_TEMPLATE:
        raise UserError(f"{name}: expected up to {MOST_TEMPLATE:,} characters of template, found {len(template):,}")
    (answer,) = _PROCESS.ask(_request(template, [json.dumps(variables)]), name)
    if "text" in answer:
        return Rendered(answer["text"], [(start, end) for start, end in answer["spans"]])
    # In the template's or in Python's words: shown in one line, whatever they are.
    words = " ".join("".join(c if c.isprintable() else " " for c in answer["error"]).split())
    words = words if len(words) <= 200 else words[:197] + "..."
    raise UserError(
        {
            "refused": f"{name}: the chat template refuses this conversation: {words}",
            "syntax": f"{name}: expected a chat template in Jinja, found an error in it: {words}; {OTHER}",
            "forbidden": f"{name}: expected a chat template that writes a prompt, found one that reaches for Python's own "
            f"objects: {words}; {OTHER}",
            "memory": f"{name}: {_TOO_MUCH.format('memory')}",
            "failed": f"{name}: expected a chat template that writes a prompt, found that it fails: {words}; {OTHER}",
        }[answer["kind"]]
    )


def render_many(template: str, conversations: Sequence[dict[str, Any]]) -> list[str | None]:
    """Return the text of each conversation, which are given by their variables. It is much faster than one by one.

    None: it failed, or others of those that were rendered together took too long. ``render`` says why.
    """
    texts: list[str | None] = []
    waiting: list[str] = []
    for i, variables in enumerate(conversations, 1):
        waiting.append(json.dumps(variables))
        if i < len(conversations) and sum(map(len, waiting)) < TOGETHER:
            continue
        try:
            texts += [answer.get("text") for answer in _PROCESS.ask(_request(template, waiting), "")]
        except UserError:
            texts += [None] * len(waiting)
        waiting = []
    return texts


def _request(template: str, conversations: Sequence[str]) -> str:
    """Return a request to render a template with variables, which are JSON."""
    source = json.dumps(template)
    share = MOST_TEXT + MOST_SHARE * len(f'{{"template": {source}, "variables": }}')
    each = (f'{{"variables": {one}, "most": {share + MOST_SHARE * len(one)}}}' for one in conversations)
    return f'{{"template": {source}, "each": [{", ".join(each)}]}}'


OTHER = "give another with --chat-template"
_TOO_MUCH = "expected a chat template that writes a prompt at once, found that it takes too much {}; " + OTHER


class _Process:
    """The process, which is started when it is needed first, and anew if it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: str, name: str) -> list[dict[str, Any]]:
        """Return the answers to a request. Raises UserError if the process ends over it, or takes too long."""
        with self._lock:
            running = self._started()
            deadline = time.monotonic() + ANSWER_SECONDS
            line = None
            try:
                line = _exchange(running, request.encode() + b"\n", deadline)
            finally:
                if line is None:  # on Ctrl-C too: the next answer would be to this request
                    self._stop()
        if line is None:
            raise UserError(f"{name}: {_TOO_MUCH.format('time')}")
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def _started(self) -> "subprocess.Popen[bytes]":
        """Return the running process. A process that was forked from this one has its own."""
        if self._running is not None and self._owner == os.getpid() and self._running.poll() is None:
            return self._running
        if self._owner == os.getpid():
            self._stop()
        elif not self._owner:
            atexit.register(self.close)
        self._owner, self._running = os.getpid(), _start()
        return self._running

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.wait()
            for stream in (running.stdin, running.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def close(self) -> None:
        """Stop the process, if this process has started it."""
        if self._owner == os.getpid():
            self._stop()


def _start() -> "subprocess.Popen[bytes]":
    """Start the process. It finds jinja2 where this process does, and little else."""
    specs = map(importlib.util.find_spec, ("jinja2", "markupsafe"))
    places = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None}
    environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    running = subprocess.Popen(
        # -S: no site, whose files start other code; -P: nothing from the folder of the command.
        [sys.executable, "-P", "-S", "-B", str(Path(__file__).with_name("sandbox.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(sorted(places)), "PYTHONUTF8": "1"},
    )
    line = _exchange(running, b"", time.monotonic() + START_SECONDS)
    if line is None or line.strip() != b"ready":
        running.kill()
        running.wait()
        raise UserError(
            f"chat template: expected a process that renders it, found that it cannot start ({quoted(sys.executable)}); "
            "install jinja2 3.1.6 or later"
        )
    return running


def _exchange(running: "subprocess.Popen[bytes]", request: bytes, deadline: float) -> bytes | None:
    """Write a request and return the line that answers it. None if the process ends or the deadline passes first."""
    assert running.stdin is not None and running.stdout is not None
    into, out = running.stdin.fileno(), running.stdout.fileno()
    os.set_blocking(into, False)
    pieces: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        readable, writable, _ = select.select([out], [into] if request else [], [], left)
        if writable:
            with contextlib.suppress(BlockingIOError):
                try:
                    request = request[os.write(into, request[: 1 << 16]) :]
                except BrokenPipeError:
                    return None
        if readable:
            piece = os.read(out, 1 << 20)
            if not piece:
                return None
            pieces.append(piece)
            if piece.endswith(b"\n"):
                return b"".join(pieces)
    return None


_PROCESS = _Process()
