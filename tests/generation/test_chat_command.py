"""sample.py --chat with templates, and conversations in files: what is answered, what is told, what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from llama_jax.chat.formats import ChatSetup
from llama_jax.chat.messages import Message
from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.generation.prompts import Job, read_prompts
from llama_jax.tokenizer import Tokenizer
from tests.commands import told
from tests.generation.models import build, speaking
from tests.generation.test_console import converse
from tests.inside import run

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content != 'Brief.' %}{{ raise_exception('Only Brief.') }}"
    "{% endif %}({{ m.role }}) {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
ARGS = SampleArgs(temperature=0.0, max_new_tokens=6)
PAIR = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def folder(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model (tuned) and one without a template (base)."""
    folder = tmp_path_factory.mktemp("chat")
    model = speaking(build(small_tokenizer, max_seq_len=128))
    save_checkpoint(folder / "base", model.params, model.args, small_tokenizer)
    save_checkpoint(folder / "tuned", model.params, model.args, small_tokenizer, chat=ChatSetup(TEMPLATE))
    return folder


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Model:
    return Model.load(folder / "tuned")


def sample(folder: Path, *argv: str, ckpt: str = "tuned") -> "list[str]":
    return ["sample.py", "--ckpt", ckpt, "--temperature", "0", "--max-new-tokens", "6", "--quiet", *argv]


def test_a_conversation_is_answered_in_the_models_own_format(tuned: Model, folder: Path) -> None:
    tokenizer = tuned.tokenizer
    ids = tuned.encode_chat(PAIR)
    texts = "(user) Who?", "(assistant) Me.", "(user) Why?", "(assistant)"
    expected = [tokenizer.encode(text, bos=False, eos=i < 3) for i, text in enumerate(texts)]
    assert ids == [token for part in expected for token in part]
    assert ids == tuned.encode_chat([Message(**message) for message in PAIR])  # type: ignore[arg-type]
    (folder / "m.json").write_text(json.dumps(PAIR))
    result = run(sample(folder, "--chat", "--messages", "m.json"), folder)
    assert result.stdout.strip() == tuned.chat(PAIR, ARGS).text and result.stderr == ""


def test_the_end_of_a_turn_ends_an_answer_and_not_a_completion(tuned: Model) -> None:
    free = tuned.chat(PAIR, ARGS).token_ids
    end = free[3]
    ids = tuned.encode_chat(PAIR)
    other = dataclasses.replace(tuned)
    other.__dict__["chat_format"] = dataclasses.replace(tuned.chat_format)
    other.chat_format.__dict__["end_ids"] = frozenset({end})
    assert other.chat(PAIR, ARGS).token_ids == free[: free.index(end)]
    assert "".join(other.stream_ids(ids, ARGS, None, other.turn_end_ids)).strip() == other.chat(PAIR, ARGS).text
    assert other.generate_ids([ids], ARGS)[0].token_ids == free


def test_lines_may_have_messages_and_max_tokens(folder: Path, tuned: Model) -> None:
    lines = [
        {"messages": PAIR, "max_tokens": 4},
        {"messages": PAIR[:1]},
        {"messages": [{"role": "system", "content": "Brief."}, *PAIR]},
    ]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = sample(folder, "--prompts-file", "m.jsonl", "--output", "m.out")
    result = run(argv, folder)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    records = [json.loads(line) for line in (folder / "m.out").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["Why?", "Who?", "Why?"]
    for line, record in zip(lines, records, strict=True):
        args = dataclasses.replace(ARGS, max_new_tokens=line.get("max_tokens", 6))
        assert record["completion"] == tuned.chat(line["messages"], args).text  # type: ignore[arg-type]
        assert record["made_with"]["chat"] and record["prompt_tokens"] == len(tuned.encode_chat(line["messages"]))  # type: ignore[arg-type]
    lines[1]["messages"] = [PAIR[0], PAIR[1], PAIR[0]]  # another conversation, which ends alike
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "line 2: expected a result made with conversation" in told(run(argv, folder))


def test_prompts_and_conversations_go_together_with_chat_alone(folder: Path) -> None:
    (folder / "both.jsonl").write_text('{"messages": [{"role": "user", "content": "Who?"}]}\n{"prompt": "Why?"}\n')
    argv = sample(folder, "--prompts-file", "both.jsonl")
    assert "both.jsonl: line 2: expected messages, as both.jsonl: line 1 has, found a prompt" in told(run(argv, folder))
    result = run([*argv, "--chat"], folder)
    assert result.returncode == 0 and result.stdout.count("\n---\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": PAIR, "model": "x"}, "unknown key model"),
        ({"messages": PAIR, "prompt": "a"}, "expected a prompt or messages, found both"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": "hi"}, "messages: expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages: message 1: expected a role and a text"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages: message 1: expected system, user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1: expected a role and a text"),
        ({"messages": PAIR, "max_tokens": "4"}, "max_new_tokens: expected int, found '4'"),
        ({"messages": PAIR, "max_tokens": 4, "max-new-tokens": 5}, "expected max_tokens or max_new_tokens, found both"),
        ({"max_tokens": 4}, 'expected an object with a text as "prompt", or with "messages"'),
    ],
)
def test_other_lines_are_refused_by_name(tmp_path: Path, line: object, words: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + json.dumps(line))
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / "p.jsonl"), ARGS)
    assert str(refused.value).startswith(f"{tmp_path / 'p.jsonl'}: line 2: ") and words in str(refused.value)


def test_a_prompt_may_have_max_tokens(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "max_tokens": 3}')
    where = f"{tmp_path / 'p.jsonl'}: line 1"
    assert read_prompts(str(tmp_path / "p.jsonl"), ARGS) == [
        Job("a", dataclasses.replace(ARGS, max_new_tokens=3), where)
    ]


@pytest.mark.parametrize(
    ("argv", "ckpt", "words"),
    [
        (["--chat", "hi"], "base", "base: expected a model with a chat template, found none"),
        (["--chat"], "base", "base: expected a model with a chat template, found none"),
        (["--chat", "hi", "--chat-template", "none"], "base", "--chat-template: expected a file or one of llama2"),
        (["--chat", "hi", "--chat-template", "loop.jinja"], "base", "--chat-template loop.jinja: expected a chat template"),
        (["--chat", "--chat-template", "evil.jinja"], "base", "reaches for Python's own objects"),
        (["--chat", "--chat-template", "empty.jinja"], "base", "empty.jinja: expected a chat template, found an empty file"),
        (["--chat", "--chat-template", "latin.jinja"], "base", "latin.jinja: expected a chat template in UTF-8"),
        (["--chat", "hi", "--system", "Long."], "tuned", "the chat template refuses this conversation: Only Brief."),
        (["--chat", "--system", "Long."], "tuned", "the chat template refuses this conversation: Only Brief."),
        (["hi", "--chat-template", "chatml"], "tuned", "--chat-template: expected --chat beside it"),
        (["--prompts-file", "sys.jsonl", "--system", "Brief."], "tuned", "without a system message beside --system"),
        (["--prompts-file", "p.txt", "--system", "Brief."], "tuned", "--system: expected --chat beside it"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(folder: Path, argv: list[str], ckpt: str, words: str) -> None:
    (folder / "loop.jinja").write_text("{% for i in range(10**9) %}{% endfor %}")
    (folder / "evil.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    (folder / "empty.jinja").write_text("\n")
    (folder / "latin.jinja").write_bytes(b"caf\xe9")
    (folder / "p.txt").write_text("hi\n")
    (folder / "sys.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "Brief."}, *PAIR]}))
    result = run(sample(folder, *argv, ckpt=ckpt), folder, "")
    line = told(result)
    assert line.startswith("error: ") and words in line and result.stdout == ""


def test_a_template_of_a_file_or_name_is_used_instead_of_the_models(folder: Path, tuned: Model) -> None:
    (folder / "mine.jinja").write_text("{{ messages[0].content }}:")
    other = dataclasses.replace(tuned, chat_template=str(folder / "mine.jinja"))
    assert other.encode_chat(PAIR[:1]) == tuned.tokenizer.encode("Who?:", bos=False)
    result = run(sample(folder, "--chat", "Who?", "--chat-template", "mine.jinja", "--output", "t.out"), folder)
    assert result.returncode == 0, result.stderr
    (folder / "mine.jinja").write_text("{{ messages[0].content }};")
    again = run(sample(folder, "--chat", "Who?", "--chat-template", "mine.jinja", "--output", "t.out"), folder)
    assert "expected a result made with chat_template" in told(again)
    named = run(sample(folder, "--chat", "Who?", "--chat-template", "chatml", "--json"), folder)
    assert named.returncode == 0 and "<|im_start|> and <|im_end|> are not" in named.stderr
    with pytest.warns(UserWarning, match="read as text"):
        ids = dataclasses.replace(tuned, chat_template="chatml").encode_chat(PAIR[:1])
    assert json.loads(named.stdout)["prompt_tokens"] == len(ids)


def test_a_conversation_at_the_console_goes_on_in_the_models_format(
    tuned: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Who? </s>\nWhy?\n" + "1 " * 40 + "\n" + "2 " * 30 + "\n"
    prompts = converse(tuned, text, monkeypatch, "Brief.", ARGS)
    out, err = capsys.readouterr()
    system, first = Message("system", "Brief."), Message("user", "Who? </s>")
    assert prompts[0] == tuned.encode_chat([system, first])
    answer = Message("assistant", out.split("\n")[0])
    assert prompts[1] == tuned.encode_chat([system, first, answer, Message("user", "Why?")])
    assert "</s> in a prompt is read as plain text" in err and "forgotten" in err
    assert all(len(ids) < 128 for ids in prompts)
    assert prompts[0].count(tuned.tokenizer.eos_id) == 2
