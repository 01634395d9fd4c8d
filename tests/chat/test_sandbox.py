"""Hostile templates: refused in one line, in little time and memory, with nothing run and no file read."""

import os
import re
import time
from pathlib import Path

import pytest

from llama_jax.chat import renderer
from llama_jax.chat.renderer import render
from llama_jax.errors import UserError

MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>"}
ATTACKS = {
    # Loops.
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "time",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "without end",
    "{% set ns = namespace(f=0) %}{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}": "without end",
    "{{ lipsum(n=99999) }}": "time",
    "{{ range(99999) | batch(1) | map('string') | map('length') | sort | list * 99999 }}": "",
    "{{ 'a' | replace('a', 'b' * 99999) | replace('b', 'c' * 99999) }}": "memory",
    "{% for i in cycler %}{% endfor %}": "fails",
    # Numbers and texts that grow.
    "{{ 10 ** (10 ** 9) }}": "time",
    "{{ 'a' * 10 ** 10 }}": "memory",
    "{{ ['a'] * 10 ** 10 }}": "memory",
    "{{ ('a' * 10000) * 10000 * 10000 }}": "memory",
    "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a | length }}": "memory",
    "{% set ns = namespace(a=['a']) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}": "memory",
    "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}": "memory",
    "{{ 'a'.center(10 ** 10) }}": "memory",
    "{{ 'a' | center(10 ** 10) }}": "memory",
    "{{ 'a'.ljust(10 ** 10) }}": "memory",
    "{{ 'a\na' | indent(10 ** 10) }}": "memory",
    "{{ '%9999999999d' % 3 }}": "memory",
    "{{ '%9999999999d' | format(3) }}": "memory",
    "{{ '{:9999999999}'.format(3) }}": "memory",
    "{{ ('a' * 99999).join(range(99999) | map('string')) }}": "memory",
    "{{ 'a'.zfill(10 ** 10) }}": "memory",
    "{{ 'a\t'.expandtabs(10 ** 10) }}": "",
    "{{ strftime_now('%c' * 99999999) }}": "",
    "{{ 'a' * 200000 }}": "more than",
    "{% for i in range(99999) %}aaaa{% endfor %}": "more than",
    "{{ [1] | tojson(indent=10 ** 10) }}": "memory",
    "{{ 'a' | wordwrap(1) | wordwrap(0) }}": "fails",
    # Python's own objects.
    "{{ ''.__class__.__mro__ }}": "Python's own",
    "{{ ''.__class__ }}": "Python's own",
    "{% if ''.__class__ %}{% endif %}hi": "Python's own",
    "{{ ''['__class__'] }}": "Python's own",
    "{{ '' | attr('__class__') }}": "Python's own",
    "{{ ''['__cla' ~ 'ss__'] }}": "Python's own",
    "{{ ['a'] | map(attribute='__class__') | list }}": "Python's own",
    "{{ '{0.__class__}'.format(1) }}": "Python's own",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}": "Python's own",
    "{{ cycler.__init__.__globals__.os.popen('id') }}": "Python's own",
    "{{ lipsum.__globals__ }}": "Python's own",
    "{{ joiner.__init__.__globals__ }}": "Python's own",
    "{{ namespace.__init__.__globals__ }}": "Python's own",
    "{{ self.__init__.__globals__ }}": "Python's own",
    "{{ self._TemplateReference__context }}": "Python's own",
    "{{ raise_exception.__globals__ }}": "Python's own",
    "{{ raise_exception.__code__ }}": "Python's own",
    "{{ strftime_now.func_globals }}{{ strftime_now.__closure__ }}": "Python's own",
    "{{ dict.__class__ }}{{ dict.mro() }}": "Python's own",
    "{{ dict.fromkeys.__func__ }}": "Python's own",
    "{{ messages.append(1) }}": "Python's own",
    "{{ messages[0].update(role='system') }}": "Python's own",
    "{{ namespace(__class__=1) }}": "Python's own",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}": "Python's own",
    "{{ (messages | map('attr', '__class__') | list)[0] }}": "Python's own",
    "{{ messages | groupby('__class__') }}": "Python's own",
    "{{ messages | selectattr('__class__') | list }}": "Python's own",
    "{% macro f() %}{% endmacro %}{{ f.__call__.__func__ }}{{ f._func }}": "Python's own",
    "{% for i in [1] %}{{ loop.__init__ }}{% endfor %}": "Python's own",
    # Files and code.
    "{% include '/etc/passwd' %}": "no loader",
    "{% import '/etc/passwd' as p %}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{{ open('/etc/passwd').read() }}": "'open' is undefined",
    "{{ __import__('os') }}": "undefined",
    "{{ request.application }}": "undefined",
    "{% do messages.pop() %}": "line 1",
    # What is no template.
    "{% if %}": "line 1",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{{ " + "-" * 50_000 + "1 }}": "",
    "{% for i in [1] %}" * 5000 + "{% endfor %}" * 5000: "",
    "a" * 300_000: "characters of template",
    "{{ '\\ud800' }}": "surrogates",
    "{{ 1 / 0 }}": "ZeroDivisionError",
}  # fmt: skip


@pytest.mark.parametrize("template", ATTACKS, ids=lambda template: template[:60])
def test_a_hostile_template_is_refused_in_one_line(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        render(template, MESSAGES, "x.jinja")
    line = str(refused.value)
    assert line.startswith("x.jinja: ") and line.isprintable() and len(line) < 500
    assert ATTACKS[template] in line
    assert time.monotonic() - began < 60  # seconds of the clock; the limits are of work, and 6 seconds at the most
    assert render("{{ messages[0].content }}", MESSAGES, "x.jinja").text == "hi", "the next template is rendered"


def test_the_process_is_held_to_its_memory_and_opens_no_file() -> None:
    render("hi", MESSAGES, "x.jinja")
    running = renderer._PROCESS._running
    assert running is not None
    limits = Path(f"/proc/{running.pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[:2] for line in limits}
    assert found["Max address space"] == [str(256 << 20)] * 2
    assert found["Max open files"] == ["3", "3"] and found["Max file size"] == ["0", "0"]
    assert not [key for key in Path(f"/proc/{running.pid}/environ").read_bytes().split(b"\0") if b"HOME" in key]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{running.pid}/status").read_text())
    assert peak is not None and int(peak[1]) << 10 < 256 << 20


def test_one_process_renders_all_templates_and_is_started_anew_if_it_has_ended() -> None:
    render("hi", MESSAGES, "x.jinja")
    first = renderer._PROCESS._running
    render("ho", MESSAGES, "x.jinja")
    assert first is not None and renderer._PROCESS._running is first
    first.kill()
    first.wait()
    assert render("hi", MESSAGES, "x.jinja").text == "hi"
    assert renderer._PROCESS._running is not first


def test_a_forked_process_renders_by_itself() -> None:
    render("hi", MESSAGES, "x.jinja")
    assert renderer._PROCESS._running is not None
    before = renderer._PROCESS._running.pid
    pid = os.fork()
    if not pid:
        try:
            text = render("{{ 1 + 1 }}", MESSAGES, "x.jinja").text
            other = renderer._PROCESS._running is not None and renderer._PROCESS._running.pid != before
            renderer._PROCESS.close()
            os._exit(0 if text == "2" and other else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert render("hi", MESSAGES, "x.jinja").text == "hi" and renderer._PROCESS._running.pid == before


def test_what_an_assistant_says_is_marked() -> None:
    template = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    text, spans = render(template, {"messages": [{"content": "ab"}, {"content": ""}, {"content": "é🦊"}]}, "x.jinja")
    assert text == "<ab><><é🦊>" and [text[start:end] for start, end in spans] == ["ab", "", "é🦊"]


def test_long_conversations_are_rendered() -> None:
    messages = [{"role": "user", "content": "é" * 1_000_000}] * 2
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    assert render(template, {"messages": messages}, "x.jinja").text == "é" * 2_000_000
