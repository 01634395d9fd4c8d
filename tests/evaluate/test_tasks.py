"""Tasks in JSON lines: what is read, what is refused by name, and the prompts that are made of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llama_jax.chat.messages import Message
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.evaluate.report import remarks
from llama_jax.evaluate.scores import asked, evaluate_task
from llama_jax.evaluate.scoring import Request
from llama_jax.evaluate.tasks import (
    Item,
    Task,
    check_shots,
    joined,
    parse_task,
    prompt_of,
    read_tasks,
    shots_of,
    unread,
)
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build
from tests.tokenizers.made import CONFIG, bytewise, put

ASKED = {"role": "user", "content": "Who?"}
CHOICE = {"context": "The owl saw", "choices": ["a fox", "the river"], "answer": 1}


def written(folder: Path, *records: Any, name: str = "task.jsonl") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_records_of_four_kinds_are_read(tmp_path: Path) -> None:
    (task,) = read_tasks([written(tmp_path, CHOICE, CHOICE | {"id": 7, "context": ""})])
    assert (task.name, task.kind) == ("task", "choices")
    assert task.items == (
        Item(1, "The owl saw", ("a fox", "the river"), 1),
        Item(2, "", ("a fox", "the river"), 1),
    )
    (task,) = read_tasks([written(tmp_path, {"question": "Who?", "answer": "the fox"})])
    assert task.kind == "answers" and task.items == (Item(1, "Question: Who?\nAnswer:", ("the fox",), 0),)
    messages = [Message("system", "Be brief."), Message("user", "Who?")]
    given = [message._asdict() for message in messages]
    (task,) = read_tasks([written(tmp_path, {"messages": given, "answer": "The fox.", "id": 3})])
    assert task.kind == "chats" and task.items == (Item(1, "", ("The fox.",), 0, tuple(messages)),)
    (task,) = read_tasks([written(tmp_path, {"text": "An owl.\n"})])
    assert task.kind == "texts" and task.items == (Item(1, "", ("An owl.\n",), 0),)


def test_the_format_of_questions_can_be_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "Who {x}?", "answer": "the fox"})
    (task,) = read_tasks([path], "Q: {question} A:")
    assert task.items[0].prompt == "Q: Who {x}? A:"
    with pytest.raises(UserError, match=r"^--question-format: expected a text with {question}"):
        read_tasks([path], "Q:")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "answer: expected the number .*0 to 1, found 2"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "answer: expected the number .*found True"),
        ({"context": "a", "choices": ["b", "c"], "answer": "c"}, "answer: expected the number .*found 'c'"),
        ({"context": "a", "choices": ["b", "c"]}, "answer: expected the number .*found none"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "choices: expected a list of two or more"),
        ({"context": "a", "choices": ["b", " "], "answer": 0}, "choices: expected a list of two or more"),
        ({"context": "a", "choices": "bc", "answer": 0}, "choices: expected a list of two or more"),
        ({"context": "a", "answer": 3}, "answer: expected a text, .*found 3"),
        ({"context": "a"}, "answer: expected a text, .*found none"),
        ({"context": 3, "answer": "b"}, "context: expected a text, found 3"),
        ({"question": " ", "answer": "b"}, "question: expected a text, found ' '"),
        ({"question": "a", "context": "a", "answer": "b"}, "expected one of .*found both"),
        ({"prompt": "a", "answer": "b"}, "expected one of the keys .*found 'prompt', 'answer'"),
        ({"text": ""}, "text: expected a text, found ''"),
        ({"messages": [ASKED]}, "answer: expected a text, .*found none"),
        ({"messages": [], "answer": "b"}, "messages: expected a list of messages .*found an empty one"),
        ({"messages": ["a"], "answer": "b"}, "messages: message 1: expected a role and a text"),
        (
            {"messages": [ASKED, ASKED | {"role": "assistant"}], "answer": "b"},
            "messages: expected the last one from the user, found the assistant",
        ),
        (
            {"messages": [ASKED], "answer": "b"},
            "expected a record like the first, multiple choice, found conversations",
        ),
        ({"messages": [ASKED], "context": "a", "answer": "b"}, "messages: expected no context beside a conversation"),
        ({"messages": [ASKED], "choices": ["a", "b"], "answer": 0}, "messages: expected no choices beside"),
        ([1], r"expected a JSON object, found \[1\]"),
        ({"text": "A whole document."}, "expected a record like the first, multiple choice, found documents"),
    ],
)
def test_a_bad_record_is_named_with_its_file_line_and_key(tmp_path: Path, record: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"task\.jsonl: line 2: {words}"):
        read_tasks([written(tmp_path, CHOICE, record)])


def test_a_key_that_a_record_has_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0, "answer": 1}')
    with pytest.raises(UserError, match=r"task\.jsonl: line 1: 'answer': expected a key once, found it twice"):
        read_tasks([str(tmp_path / "task.jsonl")])


def test_files_that_are_missing_empty_or_no_json_are_named(tmp_path: Path) -> None:
    for content, words in ((b"", "expected one or more records"), (b"{", "line 1: expected a JSON object, found"),
                           (b"\xff\xfe", "expected text in UTF-8, found UTF-16")):  # fmt: skip
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=rf"bad\.jsonl: {words}"):
            read_tasks([str(tmp_path / "bad.jsonl")])
    with pytest.raises(UserError, match=r"^--tasks: expected a file of records in JSON lines, found no file .*none"):
        read_tasks([str(tmp_path / "none.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^--tasks: expected JSON lines in the folder .*empty, found no file"):
        read_tasks([str(tmp_path / "empty")])


def test_a_folder_is_its_files_and_tasks_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b/x.jsonl"):
        written(tmp_path, CHOICE, name=name)
    found = read_tasks([str(tmp_path / "a"), str(tmp_path / "b" / "x.jsonl")])
    assert [task.name for task in found] == [str(tmp_path / "a/x.jsonl"), "y", str(tmp_path / "b/x.jsonl")]
    with pytest.raises(UserError, match="expected each file once"):
        read_tasks([str(tmp_path / "a"), str(tmp_path / "a" / "x.jsonl")])


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("So", "it is", " it is"),
        ("So ", "it is", "it is"),
        ("So\n", "it", "it"),
        ("So", "\nit", "\nit"),
        ("", "it", "it"),
    ],
)
def test_a_space_comes_between_unless_there_is_white_space(prompt: str, answer: str, text: str) -> None:
    assert joined(prompt, answer) == text


def numbered(count: int, answer: str = "b{}") -> bytes:
    return "".join(json.dumps({"context": f"a{i}", "answer": answer.format(i)}) + "\n" for i in range(count)).encode()


def test_examples_follow_from_the_seed_and_the_items_number_and_are_other_records() -> None:
    task = parse_task("t", "t.jsonl", numbered(6))
    assert prompt_of(task, 2, 0, 0) == "a2"
    drawn = [[item.line - 1 for item in shots_of(task, index, 3, 0)] for index in range(6)]
    assert all(index not in lines and len({*lines}) == 3 for index, lines in enumerate(drawn))
    assert len({tuple(lines) for lines in drawn}) > 2
    assert [[item.line - 1 for item in shots_of(task, index, 3, 1)] for index in range(6)] != drawn
    one, two, three = drawn[4]
    assert prompt_of(task, 4, 3, 0) == f"a{one} b{one}\n\na{two} b{two}\n\na{three} b{three}\n\na4"


def test_a_record_that_stands_twice_is_no_example_for_itself() -> None:
    task = parse_task("t", "t.jsonl", numbered(3) + numbered(3))
    for index, item in enumerate(task.items):
        assert item.prompt not in [shot.prompt for shot in shots_of(task, index, 4, 0)]
        assert len(shots_of(task, index, 5, 0)) == 5, "where there are too few others it is"


def test_more_examples_than_records_are_refused() -> None:
    task = parse_task("t", "t.jsonl", numbered(3))
    check_shots(task, 2)
    with pytest.raises(UserError, match=r"^--shots: expected up to 2, since t\.jsonl has 3 records, found 3"):
        check_shots(task, 3)


@pytest.mark.parametrize(
    "options", [{"shots": -1}, {"shots": "2"}, {"seed": 0.0}, {"seed": True}, {"rows": -1}, {"rows": 2.0}], ids=str
)
def test_a_number_of_another_kind_is_refused(options: dict[str, Any], small_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^--(shots|seed|batch-size): expected a whole number, 0 or more, found "):
        evaluate_task(build(small_tokenizer), parse_task("t", "t.jsonl", numbered(3)), **options)


def test_what_is_scored_is_a_task_with_records_enough(small_tokenizer: Tokenizer) -> None:
    model = build(small_tokenizer)
    with pytest.raises(UserError, match=r"^--shots: expected up to 2, since t\.jsonl has 3 records, found 3"):
        evaluate_task(model, parse_task("t", "t.jsonl", numbered(3)), shots=3)
    for other in ("t.jsonl", None, [parse_task("t", "t.jsonl", numbered(3))]):
        with pytest.raises(UserError, match=r"^task: expected a Task, found .*; read_tasks returns a list of them"):
            evaluate_task(model, other)  # type: ignore[arg-type]


def test_the_files_of_tasks_are_a_list_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, CHOICE)
    assert read_tasks([Path(path)]) == read_tasks(iter([path])) == read_tasks((path,))
    monkeypatch.chdir(tmp_path)
    for other in (".", b".", None, 5):
        with pytest.raises(UserError, match=r"^--tasks: expected a list of paths, found .*; put it in a list"):
            read_tasks(other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^--tasks: expected paths, strings or Paths, found 5"):
        read_tasks([path, 5])  # type: ignore[list-item]


def chat_task(answer: str) -> Task:
    messages = (Message("user", "Who came?"), Message("assistant", "The fox."), Message("user", "Where to?"))
    return Task("t", "t.jsonl", "chats", (Item(1, "", (answer,), 0, messages),))


@pytest.mark.parametrize("template", ["llama2", "chatml", "vicuna"])
def test_a_conversation_is_answered_rightly_if_greedy_generation_gives_the_answer_and_ends(
    template: str, small_tokenizer: Tokenizer
) -> None:
    model = dataclasses.replace(build(small_tokenizer, max_seq_len=256), chat_template=template)
    if template == "chatml":  # its end is no token of this vocabulary
        with pytest.raises(
            UserError, match=r"^t\.jsonl: line 1: message \d: expected a special token behind the answer"
        ):
            asked(model, chat_task("a fox"))
        return
    (item,) = asked(model, chat_task("a fox"))
    (request,) = item.requests
    assert list(request.context) == model.encode_chat(chat_task("").items[0].messages)
    assert request.continuation[-1] == small_tokenizer.eos_id
    said = model.generate_ids([request.context], SampleArgs(temperature=0.0, max_new_tokens=8, ignore_eos=True))
    for ids, right in ((said[0].token_ids, True), ([*said[0].token_ids[:-1], 3], False)):
        made = [item._replace(requests=[Request(request.context, ids)])]
        found = evaluate_task(model, chat_task("a fox"), items=made)
        assert found.summary["accuracy"] == found.per_item[0]["correct"] == right


def test_a_conversation_that_the_model_cannot_be_asked_is_named(small_tokenizer: Tokenizer) -> None:
    model = build(small_tokenizer, max_seq_len=64)
    with pytest.raises(UserError, match=r"^t\.jsonl: line 1: .*expected a model with a chat template"):
        asked(model, chat_task("a fox"))


def test_a_document_is_predicted_from_bos_on_whatever_the_tokenizer_begins_texts_with(tmp_path: Path) -> None:
    """Of a tokenizer that begins no text with BOS, the first token was not scored, and one token alone had no score."""
    tokenizer = Tokenizer(put(tmp_path, bytewise(), CONFIG | {"add_bos_token": False}))
    assert not tokenizer.adds_bos
    model = build(tokenizer, max_seq_len=16)
    texts = ["a", "The owl saw a fox by the river, and the fox saw the owl."]
    task = parse_task("t", "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    for text, item, found in zip(texts, asked(model, task), evaluate_task(model, task).per_item, strict=True):
        ids = tokenizer.encode(text, bos=False)
        assert [token for request in item.requests for token in request.continuation] == ids
        assert list(item.requests[0].context) == [tokenizer.bos_id] and found["tokens"] == len(ids)


def test_a_choice_that_stands_twice_is_told() -> None:
    records = [
        {"context": "a", "choices": ["b", "b"], "answer": 1},
        {"context": "a", "choices": ["b", "c"], "answer": 1},
    ]
    summary = {"cut": 0, "n": 2, "bits_per_byte": None}
    (told,) = remarks(
        parse_task("t", "t.jsonl", "".join(json.dumps(one) + "\n" for one in records).encode()), summary, 64
    )
    assert told.startswith("t: 1 of 2 items have a choice twice")
    spaced = records[0] | {"choices": ["b", " b"]}  # the same behind a prompt, which a space follows
    assert remarks(parse_task("t", "t.jsonl", json.dumps(spaced).encode()), summary | {"n": 1}, 64)
    assert remarks(parse_task("t", "t.jsonl", json.dumps(records[1]).encode()), summary, 64) == []


def test_what_is_in_a_folder_of_tasks_and_not_read_is_told(tmp_path: Path) -> None:
    written(tmp_path, CHOICE)
    assert unread([str(tmp_path), str(tmp_path / "task.jsonl")]) == []
    for name in ("a.json", "b.txt", ".hidden"):
        (tmp_path / name).touch()
    written(tmp_path / "more", CHOICE)
    assert unread([str(tmp_path)]) == [
        f"not read, since only files named .jsonl and .ndjson in {tmp_path} are: 3 (a.json, b.txt, more)"
    ]
    assert len(read_tasks([str(tmp_path)])) == 1
