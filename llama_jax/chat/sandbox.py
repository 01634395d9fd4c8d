"""A program that renders chat templates, apart from the process that asked: a template may come from anybody.

It is started by renderer.py, and reads a JSON object a line from standard input: {"template", "each"}, where each
rendering has {"variables", "most"}. It answers with a list: {"text", "spans"} or {"error", "kind"} of each. A template
is rendered as transformers 5 does
(utils/chat_template_utils.py): in jinja2's immutable sandbox, with its settings, functions and tags. The sandbox hides
Python's own objects and files. What it does not limit is limited here by the system: the memory, the seconds of each
rendering, and that no file can be opened. It imports nothing of this package.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

# Bytes of memory, and seconds of a processor for a rendering. The largest templates that are published need 60 MB and
# some milliseconds.
MOST_MEMORY = 256 << 20
MOST_SECONDS = 2.0
# The templates that are kept compiled.
KEPT = 8


class RefusedError(Exception):
    """An error that a template raises on purpose, with ``raise_exception``."""


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which transformers puts around what an assistant says.

    ``spans`` lists where in the text these parts begin and end.
    """

    tags = {"generation"}  # noqa: RUF012  jinja2's own spelling

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.written: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parse the tag and what stands in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        start = sum(map(len, self.written))
        self.spans.append((start, start + len(text)))
        return text


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which could lead to Python's own objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2 does, so that a name may be "self"
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}")


class Dict:
    """The function ``dict``, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return dict.fromkeys of the arguments."""
        return dict.fromkeys(*args, **kwargs)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which refuses a template that asks for a hidden attribute, even if it does nothing with it."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise SecurityError."""
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of {type(obj).__name__!r} is hidden from templates")


def environment() -> Sandbox:
    """Return the environment in which transformers renders templates."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise RefusedError(str(message))


class Renderer:
    """Renders templates and keeps those of late compiled."""

    def __init__(self) -> None:
        self._environment = environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request. See the module."""
        try:
            text, spans = self._rendered(asked["template"], asked["variables"], asked["most"])
            text.encode()  # fails on half a character, which no answer can hold
            return {"text": text, "spans": spans}
        except RefusedError as error:
            return {"kind": "refused", "error": str(error)}
        except jinja2.TemplateSyntaxError as error:
            return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
        except jinja2.sandbox.SecurityError as error:
            return {"kind": "forbidden", "error": str(error)}
        except MemoryError:
            return {"kind": "memory", "error": ""}
        except RecursionError:
            return {"kind": "failed", "error": "it calls itself without end"}
        except Exception as error:
            return {"kind": "failed", "error": f"{type(error).__name__}: {error}"}

    def _rendered(self, source: str, variables: dict[str, Any], most: int) -> tuple[str, list[tuple[int, int]]]:
        if source not in self._compiled:
            while len(self._compiled) >= KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[source] = self._environment.from_string(source)
        generation = self._environment.extensions[Generation.identifier]
        assert isinstance(generation, Generation)
        written: list[str] = []
        spans: list[tuple[int, int]] = []
        generation.written, generation.spans = written, spans
        size = 0
        for part in self._compiled[source].generate(variables):
            size += len(part)
            if size > most:
                raise ValueError(f"it writes more than {most:,} characters")
            written.append(part)
        return "".join(written), spans


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Let the system end the process if the block takes more than MOST_SECONDS of a processor."""
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def main() -> None:
    """Answer requests until standard input ends."""
    renderer = Renderer()
    # Whatever is imported or opened late is imported and opened before nothing can be opened any more.
    renderer.answer({"template": "{{ a.b.c }}", "variables": {}, "most": 1})
    warm = "{{ lipsum(n=1) }}{{ strftime_now('%c') }}{{ [1] | random }}{{ {} | pprint }}{{ 'a' | urlize }}{{ a | tojson(indent=1) }}{{ 'a b' | wordwrap(1) }}"
    renderer.answer({"template": warm, "variables": {"a": {}}, "most": 10_000})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides on Ctrl-C
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    for kind, most in (
        (resource.RLIMIT_AS, MOST_MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        with contextlib.suppress(ValueError, OSError):  # a system may lack one
            resource.setrlimit(kind, (most, most))
    print("ready", flush=True)
    for line in sys.stdin:
        with _limited():
            asked = json.loads(line)
        answers = []
        for one in asked["each"]:
            with _limited():
                answers.append(json.dumps(renderer.answer({"template": asked["template"], **one})))
        print(f"[{', '.join(answers)}]", flush=True)


if __name__ == "__main__":
    main()
