"""Files of prompts: what is read, what is refused, what is said, and what is done with prompts that are too long."""

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax.chat.formats import ChatFormat, ChatSetup, choose
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation.chat import Message, read_messages
from llama_jax.generation.prompts import Asked, Job, TooLong, ask, given_prompts, read_prompts
from llama_jax.generation.remarks import (
    empty_prompts,
    idle_settings,
    looking_like_records,
    names_of_files,
    pasted,
    told_of,
)
from llama_jax.tokenizer import Tokenizer
from tests.tokenizers.made import CONFIG as TOKENS
from tests.tokenizers.made import bytewise, put

ARGS = SampleArgs(seed=3)


def prompts(tmp_path: Path, text: str, name: str = "p.txt") -> list[Job]:
    (tmp_path / name).write_bytes(text.encode())
    return read_prompts(str(tmp_path / name), ARGS)


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    one, two = Job("one ", ARGS, f"{path}: line 1"), Job(" two\u2028three", ARGS, f"{path}: line 3")
    assert prompts(tmp_path, "\ufeffone \r\n\n two\u2028three") == [one, two]


def test_an_object_a_line_has_settings_of_its_own(tmp_path: Path) -> None:
    text = '{"prompt": ""}\n{"prompt": "b", "top-k": 4, "stop": "x", "logit_bias": {"5": -1}, "n": 2}\n'
    text += '{"prompt": "c", "stop": ["a", "b"], "temperature": 1}'
    jobs = prompts(tmp_path, text, "p.jsonl")
    assert jobs[0][:2] == ("", ARGS)
    assert jobs[1][:2] == ("b", SampleArgs(seed=3, top_k=4, stop=("x",), logit_bias={5: -1.0}, n=2))
    assert jobs[2][:2] == ("c", SampleArgs(seed=3, stop=("a", "b"), temperature=1.0))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected a JSON object"), ("[" * 100_000, "expected a JSON object"), ("[1]", "prompt"), ("{}", "prompt"),
        ('{"prompt": 3}', "prompt"), ('{"prompt": "a", "temprature": 1}', "unknown key temprature"),
        ('{"prompt": "a", "temperature": -1}', "temperature: expected"), ('{"prompt": "a", "top_p": 2}', "top_p: expected"),
        ('{"prompt": "a", "n": 0}', "n: expected"), ('{"prompt": "a", "n": "2"}', "n: expected"),
        ('{"prompt": "a", "stop": [1]}', "stop: expected"), ('{"prompt": "a", "stop": ""}', "stop: expected"),
        ('{"prompt": "a", "logit_bias": {"a": 1}}', "logit_bias: expected"),
        ('{"prompt": "a", "logit_bias": {"1": "x"}}', "logit_bias: expected"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias: expected"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        prompts(tmp_path, '{"prompt": "good"}\n' + line, "p.jsonl")
    assert f"{tmp_path / 'p.jsonl'}: line 2: " in str(refused.value) and words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="--prompts-file: expected a file of prompts, found no file"):
            read_prompts(str(path), ARGS)
    with pytest.raises(UserError, match="expected one or more prompts, found none"):
        prompts(tmp_path, "\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="expected text in UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"), ARGS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9\n", "line 1: expected text in UTF-8, found the byte 0xe9"),
        (b"a\nb\r\n\xff", "line 3: expected text in UTF-8, found the byte 0xff"),
        ("a\nb".encode("utf-16"), "expected text in UTF-8, found UTF-16"),
        ("a\nb".encode("utf-16-be"), "found a NUL byte; convert it: iconv -f UTF-16BE -t UTF-8"),
        (b"a\nb\0c\n", "line 2: expected text in UTF-8, found a NUL byte; delete it"),
        ("é\na".encode("utf-32"), "found UTF-32"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', 'found JSON objects with "prompt"; give them to --prompts-file, an object'),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', 'found JSON objects with "messages"'),
        (b'{"prefix": "a", "suffix": "b"}\n{"prompt": "b"}\n', 'found JSON objects with "prefix"'),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]\n', 'found JSON objects with "prompt"'),
        (b'{\n "messages": []\n}\n', 'found JSON objects with "messages"'),
        (b'[\n{"role": "user", "content": "a"}]', 'found JSON objects with "role"'),
        (b'{"text": "a"}\n{"text": "b"}\n', 'found JSON objects with "text"'),
        (b'{"input": "a"}\n', 'found JSON objects with "input"'),
        (b"\x1f\x8b\x08\0\xff", "expected text in UTF-8, found a gzip file; decompress it first"),
        (b"PAR1" + bytes(range(128, 160)), "found a parquet file"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_text_is_told_by_its_line(
    tmp_path: Path, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / "p.txt"), ARGS)
    assert str(refused.value).startswith(str(tmp_path / "p.txt")) and words in str(refused.value)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    with pytest.raises(UserError) as refused:
        read_prompts("", ARGS)
    assert str(refused.value).startswith("standard input: ") and words in str(refused.value)


def test_a_text_that_begins_with_a_brace_is_a_prompt(tmp_path: Path) -> None:
    assert [job.prompt for job in prompts(tmp_path, '{"a": 1}\n{ x\n')] == ['{"a": 1}', "{ x"]
    assert [job.prompt for job in prompts(tmp_path, '{"prompt": 1}\n[x')] == ['{"prompt": 1}', "[x"]


@pytest.mark.parametrize("content", ['["Once", "Two"]', '{"prompt": "Once"}', "Once"], ids=str)
def test_a_json_file_is_not_read_line_by_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=r"p\.json: expected a prompt a line, or JSON objects a line .* \.jsonl"):
        read_prompts(str(tmp_path / "p.json"), ARGS)


def test_a_table_is_no_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer\nOnce,yes\n")
    with pytest.raises(UserError, match=r"p\.csv: expected a prompt a line, .*, found a file that ends in \.csv"):
        read_prompts(str(tmp_path / "p.csv"), ARGS)


def test_lines_that_look_like_records_are_told(tmp_path: Path) -> None:
    told = looking_like_records(prompts(tmp_path, '{"prompt": "a"}\n{"prompt": "b"\n'))
    assert told.startswith("1 of 2 prompts is a JSON object, and read as text: ") and "p.txt: line 1; a file" in told
    assert "every prompt is in quotation marks" in looking_like_records(prompts(tmp_path, '"a"\n"b c"\n'))
    for text in ('"a" said\n"b"\n', '"a"\n', "{ x\n[y\n"):
        assert looking_like_records(prompts(tmp_path, text)) == ""


def test_empty_prompts_are_told() -> None:
    assert empty_prompts(given_prompts(["a", "", ""], ARGS)) == "2 of 3 prompts are empty: prompt 2, prompt 3"
    assert empty_prompts(given_prompts(["a", " "], ARGS)) == ""


def test_standard_input_is_utf8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\ufeffé 🦊\r\n\n two\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    jobs = read_prompts("-", ARGS)
    assert jobs == [Job("é 🦊", ARGS, "standard input: line 1"), Job(" two", ARGS, "standard input: line 3")]


def test_a_lone_surrogate_is_the_same_at_every_door(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (path := tmp_path / "p.jsonl").write_text('{"prompt": "a\\ud800b"}')
    (messages := tmp_path / "m.json").write_text('[{"role": "user", "content": "a\\ud800b"}]')
    (job,) = read_prompts(str(path), ARGS)
    (given,) = given_prompts(["a\ud800b"], ARGS)
    assert job.prompt == given.prompt == read_messages(messages)[0].content == "a\ufffdb"
    assert small_tokenizer.encode("a\ud800b") == small_tokenizer.encode(job.prompt)
    path.write_text('{"prompt": "a", "stop": "\\ud800"}')
    with pytest.raises(UserError, match=r"line 1: stop: expected texts in UTF-8, found '\\ud800'"):
        read_prompts(str(path), ARGS)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "top-p": 0.5, "top_p": 0.6}',
        '{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}',
        '{"prompt": "a", "json_schema": {"type": "string", "type": "number"}}',
        '{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.json").write_text(f"[{line}]")
    with pytest.raises(UserError, match=r"m\.json: "):
        read_messages(tmp_path / "m.json")
    with pytest.raises(UserError, match=r"line 1: .*: expected a key once, found it twice"):
        prompts(tmp_path, line, "p.jsonl")


CONTEXT = 32


def asked(
    tokenizer: Tokenizer, texts: list[str], too_long: TooLong, chat: bool = False, **settings: int
) -> list[Asked]:
    jobs = [Job(text, replace(ARGS, **settings), f"p.txt: line {2 * i}") for i, text in enumerate(texts, 1)]
    dialogs = [[Message("user", text)] for text in texts] if chat else []
    return ask(jobs, tokenizer, CONTEXT, too_long, dialogs, llama2_format(tokenizer))


def llama2_format(tokenizer: Tokenizer) -> ChatFormat:
    return choose(tokenizer, ChatSetup(), "llama2", "model")


LONG = "1 2 3 4 5 6 7 8 9 " * 5


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_fills_the_context_is_refused_by_its_line_and_number(
    small_tokenizer: Tokenizer, chat: bool
) -> None:
    with pytest.raises(UserError) as refused:
        asked(small_tokenizer, ["a", LONG, "b", LONG, LONG], "refuse", chat)
    message = str(refused.value)
    assert message.startswith("p.txt: line 4 (prompt 2, '1 2 3") and "expected fewer than 32 tokens" in message
    assert "(and 2 others are too long)" in message and "--too-long skip or cut" in message


def test_a_prompt_that_is_skipped_keeps_its_place(small_tokenizer: Tokenizer) -> None:
    found = asked(small_tokenizer, ["a", LONG, "b"], "skip")
    assert [one.skipped for one in found] == [False, True, False]
    assert found[0].ids == small_tokenizer.encode("a") and found[2].job.prompt == "b"
    (line,) = told_of(found, CONTEXT)
    assert line == "1 of 3 prompts fill the context of 32 tokens and are skipped: p.txt: line 4"


@pytest.mark.parametrize(("new", "room"), [(3, 3), (100, 8)])
def test_a_prompt_that_is_cut_keeps_bos_its_end_and_room_to_go_on(
    small_tokenizer: Tokenizer, new: int, room: int
) -> None:
    one, two = asked(small_tokenizer, ["a", LONG], "cut", max_new_tokens=new)
    whole = small_tokenizer.encode(LONG)
    assert one.cut == 0 and two.cut == len(whole) - (CONTEXT - room)
    assert two.ids == [whole[0], *whole[1 + two.cut :]] and len(two.ids) == CONTEXT - room
    assert told_of([one, two], CONTEXT) == [
        "1 of 2 prompts fill the context of 32 tokens and are cut at their beginning: p.txt: line 4"
    ]


def test_a_prompt_that_begins_without_bos_loses_its_beginning(tmp_path: Path) -> None:
    tokenizer = Tokenizer(put(tmp_path, bytewise(), TOKENS | {"add_bos_token": False}))
    (found,) = asked(tokenizer, [LONG], "cut", max_new_tokens=3)
    assert found.ids == tokenizer.encode(LONG)[-(CONTEXT - 3) :] and tokenizer.bos_id not in found.ids


def test_a_conversation_that_is_cut_keeps_the_format_and_the_end(small_tokenizer: Tokenizer) -> None:
    turns = [Message("user", "1 2 3 4 5 6"), Message("assistant", "7 8"), Message("user", "9 " * 40 + "the end")]
    for messages in (turns, turns[2:]):
        context = 64
        chat = llama2_format(small_tokenizer)
        (found,) = ask([Job("", ARGS)], small_tokenizer, context, "cut", [messages], chat)
        assert context // 2 < len(found.ids) <= context - context // 4 and found.cut > 0
        text = small_tokenizer.decode(found.ids)
        assert text.startswith("[INST] ") and text.endswith("the end [/INST]") and "7 8" not in text
    with pytest.raises(UserError, match="expected a system prompt and format of fewer than 20 tokens"):
        dialogs = [[Message("system", LONG), Message("user", "a")]]
        ask([Job("", ARGS, "m.json")], small_tokenizer, 20, "cut", dialogs, chat)


def test_tags_in_a_message_are_told_by_the_line(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"p.txt: line 4: message 1: expected text without \[INST\]"):
        asked(small_tokenizer, ["a", "[INST] b"], "refuse", chat=True)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", "b <c> [x]"], ""),
        (["a <s>"], "<s> in a prompt is read as plain text"),
        (["<s>[INST] hi [/INST]", "b"], "<s> and [INST] in a prompt are read as plain text"),
        (["x</s>"], "</s> in a prompt is"),
    ],
)
def test_pasted_controls_and_tags_are_told_in_one_line(
    small_tokenizer: Tokenizer, texts: list[str], words: str
) -> None:
    found = pasted(small_tokenizer, texts)
    assert found.startswith(words) and bool(found) == bool(words) and "\n" not in found


def test_a_prompt_that_is_the_name_of_a_file_is_told(tmp_path: Path) -> None:
    (path := tmp_path / "prompts.txt").touch()
    assert f"the prompt {str(path)!r} is the name of a file" in names_of_files(["Once", str(path)])
    assert "is the name of a folder" in names_of_files([str(tmp_path)])
    assert names_of_files(["Once", "", "x" * 5000]) == ""


def test_settings_that_change_nothing_at_temperature_0_are_told() -> None:
    def line(*settings: SampleArgs) -> str:
        return idle_settings([Job("a", args) for args in settings])

    assert line(SampleArgs(temperature=0.0)) == line(SampleArgs(seed=3)) == ""
    assert line(SampleArgs(temperature=0.0, seed=3), SampleArgs(temperature=0.5)) == ""
    assert line(SampleArgs(temperature=0.0, seed=3, top_p=0.5)).startswith(
        "--top-p, --seed: no effect at temperature 0"
    )
    assert "--n: all completions of a prompt are the same" in line(SampleArgs(temperature=0.0, n=2))


def test_impossible_biases_are_told_by_the_prompt(small_tokenizer: Tokenizer) -> None:
    vocab = small_tokenizer.vocab_size
    none_left = SampleArgs(logit_bias={token: -math.inf for token in range(vocab)})
    for args, words in (
        (none_left, f"logit_bias: expected a token that may be said, found all {vocab} forbidden"),
        (SampleArgs(logit_bias={vocab: 1.0}), f"logit_bias: expected ids from 0 to {vocab - 1}, found {vocab}"),
    ):
        with pytest.raises(UserError, match=f"line 2: {words}"):
            ask([Job("a", ARGS, "line 1"), Job("b", args, "line 2")], small_tokenizer, 32, "refuse")
