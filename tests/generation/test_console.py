"""sample.py as it is used: jobs of many prompts, streams that are stopped, conversations at a terminal."""

import dataclasses
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import SampleArgs
from llama_jax.generation import Model, passes
from llama_jax.generation.chat import Message, encode_dialog
from llama_jax.generation.console import Console
from llama_jax.generation.prompts import Job, ask, given_prompts
from llama_jax.tokenizer import Tokenizer
from tests.commands import ROOT
from tests.forked import Fork
from tests.generation.models import build, speaking
from tests.inside import run

ARGS = SampleArgs(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return dataclasses.replace(speaking(build(small_tokenizer, max_seq_len=128)), chat_template="llama2")


@pytest.fixture(scope="module")
def folder(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint whose completions can be long."""
    folder = tmp_path_factory.mktemp("console")
    model = speaking(build(small_tokenizer, max_seq_len=4096))
    save_checkpoint(folder / "model", model.params, model.args, small_tokenizer)
    return folder


def test_a_file_of_prompts_is_completed_in_order_and_gone_on_with(folder: Path) -> None:
    lines = [{"prompt": f"fox {i}", "max_new_tokens": 3 + i % 3} for i in range(6)] + [{"prompt": "", "n": 2}]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = [
        "sample.py",
        "--ckpt",
        "model",
        "--prompts-file",
        "p.jsonl",
        "--output",
        "out.jsonl",
        "--max-new-tokens",
        "4",
    ]
    result = run(argv, folder)
    # A slow machine says how far it is, on standard output and in lines of its own.
    assert result.returncode == 0 and "{" not in result.stdout and "32 tokens in " in result.stderr, result.stderr
    content = (folder / "out.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    assert [r["prompt"] for r in records] == [f"fox {i}" for i in range(6)] + ["", ""]
    assert [r["completion_tokens"] for r in records] == [3, 4, 5, 3, 4, 5, 4, 4]
    printed = run([*argv[:5], *argv[7:], "--json", "--quiet"], folder)
    assert printed.stderr == ""
    fields = ("prompt", "completion", "prompt_tokens", "completion_tokens", "finish_reason")
    for line, record in zip(printed.stdout.splitlines(), records, strict=True):
        assert {k: json.loads(line)[k] for k in fields} == {k: record[k] for k in fields}
    (folder / "out.jsonl").write_bytes(content[: len(content) // 2])
    assert run([*argv, "--quiet"], folder).stderr == ""
    again = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [{k: r[k] for k in fields} for r in again] == [{k: r[k] for k in fields} for r in records]
    assert run(argv, folder).stderr == "out.jsonl holds all 8 results already\n"
    other = run([*argv, "--seed", "1"], folder)
    assert other.returncode == 2 and "expected a result made with seed 1, found 0" in other.stderr


def test_ctrl_c_in_a_stream_leaves_what_was_printed_and_a_line_end(folder: Path) -> None:
    argv = [sys.executable, str(ROOT / "sample.py"), "--ckpt", "model", "Once upon", "--max-new-tokens", "4000"]
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    head = process.stdout.read(len("Once upon") + 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert head.startswith(b"Once upon") and out.endswith(b"\n")
    assert process.returncode == 130 and err == b"stopped by Ctrl-C\n"


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, argv: list[str], cwd: Path):
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, *argv], cwd=cwd, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)

    def until(self, words: str, seconds: float = 60) -> str:
        """What is printed up to ``words``."""
        text, end = "", time.monotonic() + seconds
        while not text or words not in text:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"waited for {words!r}, found {text!r}"
            text += os.read(self._master, 4096).decode(errors="replace")
        return text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self, at_prompt: bool = False) -> None:
        """Ctrl-C; behind a prompt as soon as readline listens: a signal before that waits for a key."""
        end = time.monotonic() + 60
        while at_prompt and not self._listens():
            assert time.monotonic() < end
            time.sleep(0.01)
        self._process.send_signal(signal.SIGINT)

    def _listens(self) -> bool:
        """Whether the terminal gives single keys, which readline asks for, and the process sleeps until one comes."""
        flags = termios.tcgetattr(self._master)[3]
        state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return not flags & termios.ICANON and state == "S"

    def status(self) -> int:
        return self._process.wait(60)


def test_ctrl_c_ends_an_answer_then_at_the_prompt_the_program(folder: Path) -> None:
    argv = [str(ROOT / "sample.py"), "--ckpt", "model", "--chat", "--chat-template", "llama2"]
    terminal = Terminal([*argv, "--max-new-tokens", "4000"], folder)
    assert "/reset" in terminal.until("> ")
    terminal.type("Who?\n")
    terminal.until("Who?\r\n")
    terminal.until("")  # the first of the answer
    terminal.interrupt()
    terminal.until("\n> ")
    terminal.type("/help\n")
    assert "Ctrl-C ends an answer" in terminal.until("\n> ")
    terminal.interrupt(at_prompt=True)
    assert " in " in terminal.until("s: first after")
    assert terminal.status() == 0


def converse(
    model: Model, text: str, monkeypatch: pytest.MonkeyPatch, system: str = "", args: SampleArgs = ARGS
) -> list[list[int]]:
    """The prompts that a conversation of lines makes."""
    prompts: list[list[int]] = []
    stream = Model.stream_ids

    def watched(self: Model, prompt_ids: list[int], *rest: object) -> object:
        prompts.append(prompt_ids)
        return stream(self, prompt_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "stream_ids", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    Console(model).converse(system, args)
    return prompts


def test_a_conversation_is_remembered_until_it_is_reset(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = converse(model, "Who?\n\nWhy?\n/reset\nWho?\n/quit\nnever read\n", monkeypatch)
    answer = capsys.readouterr().out.split("\n")[0]
    messages = [Message("user", "Who?"), Message("assistant", answer), Message("user", "Why?")]
    assert prompts == [encode_dialog(model.tokenizer, messages[:n]) for n in (1, 3, 1)]


def test_a_history_that_outgrows_the_context_loses_its_oldest_turns_but_not_the_system_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = converse(model, "".join(f"number {i}\n" for i in range(6)), monkeypatch, system="Brief.")
    told = [line for line in capsys.readouterr().err.splitlines() if "outgrown" in line]
    assert told and told[0] == ("the conversation has outgrown the context of 128 tokens: the oldest turn is forgotten")
    assert len(prompts) == 6 and all(len(ids) <= 128 - 8 for ids in prompts)
    for i, ids in enumerate(prompts):
        text = model.tokenizer.decode(ids)
        assert "Brief." in text and f"number {i}" in text
    assert "number 0" not in model.tokenizer.decode(prompts[-1])


def test_a_message_that_cannot_be_answered_is_told_and_forgotten(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = converse(model, "1 " * 200 + "\nsay [INST]\nWho?\n", monkeypatch)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "fewer than 128 tokens" in errors[0] and "[INST]" in errors[1]
    assert prompts[-1] == encode_dialog(model.tokenizer, [Message("user", "Who?")])


def test_answers_to_several_questions_are_stripped_and_stand_apart(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations = [[Message("user", "Who?")], [Message("user", "Why?")]]
    jobs = [Job(messages[-1].content, ARGS) for messages in conversations]
    Console(model).answer(ask(jobs, model.tokenizer, 128, "refuse", conversations, model.chat_format))
    expected = [model.chat(messages, ARGS).text for messages in conversations]
    assert capsys.readouterr().out == "\n---\n".join(text + "\n" for text in expected)[:-1] + "\n"


def test_that_the_context_ended_completions_is_told_once(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    long = dataclasses.replace(ARGS, max_new_tokens=500)
    words = "the model's context of 128 tokens ended {} before --max-new-tokens did"
    for texts, args, what in (
        ("a", long, "the completion"), ("ab", long, "2 completions"), ("a", ARGS, ""), ("ab", ARGS, ""),
        ("a", dataclasses.replace(long, stop=("\x00",), max_new_tokens=3), ""),
    ):  # fmt: skip
        for as_json in (False, True):
            console = Console(model, as_json)
            console.complete(ask([Job(text, args) for text in texts], model.tokenizer, 128, "refuse"))
            console.close()
            told = [line for line in capsys.readouterr().err.splitlines() if "context" in line]
            assert told == ([words.format(what)] if what else [])


def test_a_split_is_told_in_one_line(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes, "CPU_MOST_ROWS", 2)
    Console(model).complete(ask([Job(text, ARGS) for text in "abc"], model.tokenizer, 128, "refuse"))
    assert capsys.readouterr().err == "2 passes, the first of 2 completions: memory holds no more\n"


def test_questions_of_a_file_are_answered_each_by_itself(folder: Path) -> None:
    (folder / "questions.txt").write_text("Who?\nWhy?\n")
    argv = ["sample.py", "--ckpt", "model", "--chat", "--chat-template", "llama2", "--max-new-tokens", "6", "--quiet"]
    result = run([*argv, "--prompts-file", "questions.txt", "--output", "answers.jsonl"], folder)
    assert result.returncode == 0 and result.stdout == result.stderr == ""
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_bytes().splitlines()]
    printed = run([*argv, "Who?", "Why?"], folder).stdout
    assert printed == "\n---\n".join(r["completion"] + "\n" for r in records)
    other = run([*argv[:3], *argv[6:], "--prompts-file", "questions.txt", "--output", "answers.jsonl"], folder)
    assert other.returncode == 2 and "made with chat False, found True" in other.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_json_is_json_whatever_the_terminal_writes(
    model: Model, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, errors="backslashreplace"))
    texts = ["é 🦊", "\ud800", 'a "b" \\u00e9']
    Console(model, as_json=True, quiet=True).complete(ask(given_prompts(texts, ARGS), model.tokenizer, 128, "refuse"))
    found = [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().decode(encoding).splitlines()]
    assert [record["prompt"] for record in found] == ["é 🦊", "\ufffd", 'a "b" \\u00e9']
    assert ("é".encode(encoding, "replace") in out.getvalue()) == (encoding == "utf-8")


def test_a_conversation_may_be_json(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhy? <s>\n"))
    Console(model, as_json=True).converse("", ARGS)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["Who?", "Why? <s>"]
    messages = [Message("user", "Who?"), Message("assistant", records[0]["completion"]), Message("user", "Why? <s>")]
    assert records[1]["completion"] == model.chat(messages, ARGS).text
    assert err.startswith("<s> in a prompt is read as plain text") and err.count("\n") == 1


def test_skipped_prompts_keep_their_place(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a", "1 " * 200, "b"]
    asked = ask(given_prompts(texts, dataclasses.replace(ARGS, n=2)), model.tokenizer, 128, "skip")
    Console(model, as_json=True).complete(asked)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == [text for text in texts for _ in range(2)]
    assert [record["finish_reason"] for record in records] == ["length"] * 2 + ["too_long"] * 2 + ["length"] * 2
    Console(model).complete(asked[1:2])
    assert capsys.readouterr().out == (texts[1] + "\n") + "\n---\n" + (texts[1] + "\n")


def test_a_second_command_with_the_same_output_ends_and_a_killed_one_is_gone_on_with(folder: Path) -> None:
    (folder / "many.txt").write_text("".join(f"fox {i}\n" for i in range(70)))
    argv = ["sample.py", "--ckpt", "model", "--prompts-file", "many.txt", "--output", "many.jsonl", "--quiet"]
    argv += ["--max-new-tokens", "40"]
    output = folder / "many.jsonl"
    first = Fork(argv, folder)
    while not output.exists():
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it is not done before the second has been refused
    second = run(argv, folder)
    assert second.returncode == 2 and "many.jsonl in use" in second.stderr and second.stderr.count("\n") == 1
    os.kill(first.pid, signal.SIGCONT)
    while output.stat().st_size == 0:
        assert first.poll() is None
        time.sleep(0.001)
    first.kill()
    first.communicate()
    assert 0 < len(output.read_bytes().splitlines()) < 70
    assert run(argv, folder).returncode == 0
    assert [json.loads(line)["prompt"] for line in output.read_bytes().splitlines()] == [f"fox {i}" for i in range(70)]


def test_a_terminal_without_prompts_is_told_what_is_waited_for(folder: Path) -> None:
    terminal = Terminal([str(ROOT / "sample.py"), "--ckpt", "model", "--max-new-tokens", "4"], folder)
    terminal.until("reading prompts from standard input, one a line; Ctrl-D ends them")
    terminal.type("Who?\n\x04")
    terminal.until("s: first after")
    assert terminal.status() == 0


def test_a_flag_takes_no_prompt_and_results_may_go_to_standard_output(folder: Path) -> None:
    argv = ["sample.py", "--ckpt", "model", "--temperature", "0", "--max-new-tokens", "6", "--quiet", "--stop", r"\n"]
    result = run([*argv, "--stop", "zz", "Once", "--output", "/dev/stdout"], folder)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (record,) = map(json.loads, result.stdout.splitlines())
    assert record["prompt"] == "Once" and record["made_with"]["stop"] == ["\n", "zz"]


def test_what_looks_like_a_command_and_a_conversation_without_a_message_are_told(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = converse(model, "/exit\n", monkeypatch)
    assert prompts == [encode_dialog(model.tokenizer, [Message("user", "/exit")])]
    assert "/exit is no command, and is answered as a message" in capsys.readouterr().err
    converse(model, "\n", monkeypatch)
    assert "standard input ended without a message" in capsys.readouterr().err
