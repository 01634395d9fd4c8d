"""Conversations from files to rows: told by their fields, held out by a hash, cut, packed, read once an epoch."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.chat.examples import chat_example
from llama_jax.chat.formats import ChatFormat, ChatSetup, tokens_of
from llama_jax.chat.messages import Message
from llama_jax.chat.named import LLAMA2, NAMED
from llama_jax.config import Config, DataArgs, TrainArgs
from llama_jax.data import Data, Talking, chat_workers, load_data, open_data
from llama_jax.data.batches import PackedBatch, eval_batches, train_batches
from llama_jax.data.chat_records import Conversation, Preference, parsed
from llama_jax.data.chat_summary import chat_rows, marked
from llama_jax.data.conversations import Conversations, open_chats
from llama_jax.data.inspecting import main as inspect_main
from llama_jax.data.preparing import main as prepare_main
from llama_jax.data.sources import find_files
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

LENGTH = 64
WORDS = ["the", "owl", "fox", "river", "tree", "água", "12", "boats"]
USER, ANSWER = Message("user", "Who are you?"), Message("assistant", "An owl.")
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER._asdict(), ANSWER._asdict()], "id": "7", "source": None},
    "conversations": {"conversations": [{"from": "human", "value": USER.content}, {"from": "gpt", "value": ANSWER.content}]},
    "prompt and completion": {"prompt": USER.content, "completion": ANSWER.content, "id": 5},
    "instruction and output": {"instruction": USER.content, "input": "", "output": ANSWER.content},
}  # fmt: skip


def conversation(rng: random.Random, turns: int) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 7)))

    return [{"role": role, "content": text()} for _ in range(turns) for role in ("user", "assistant")]


def write(path: Path, records: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    write(path, [{"messages": conversation(rng, 1 + i % 3)} for i in range(300)])
    return path


def load(folder: Path, path: str | Path, tokenizer: Tokenizer, length: int = LENGTH, **changes: Any) -> Data:
    args = DataArgs(str(path), tokenizer_model_path=str(tokenizer.model_path), chat_template="llama2")
    talking = Talking(ChatSetup(has_none=True), "the model", length)
    folder.mkdir(exist_ok=True)
    found = load_data(replace(args, **changes), folder / "tokens", folder / "tokenizer.model", talking=talking)
    assert isinstance(found, Data)
    return found


def streams(data: Data) -> tuple[Conversations, Conversations]:
    train, held_out = data.tokens.train, data.tokens.eval
    assert isinstance(train, Conversations) and isinstance(held_out, Conversations)
    return train, held_out


def stored(of: Conversations) -> list[tuple[list[int], list[int]]]:
    pairs = (of.conversation(n) for n in range(of.count))
    return [(ids.tolist(), counted.astype(int).tolist()) for ids, counted in pairs]


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_is_told_by_its_fields(kind: str) -> None:
    assert parsed(RECORDS[kind]) == Conversation(kind, (USER, ANSWER))


def test_an_instruction_may_have_an_input() -> None:
    record = parsed({"instruction": "Translate.", "input": "an owl", "output": "une chouette"})
    assert isinstance(record, Conversation)
    assert record.written()[0].content == "Translate.\n\nan owl"
    assert record.written("\n\n### Input:\n")[0].content == "Translate.\n\n### Input:\nan owl"


def test_two_answers_to_a_prompt_are_a_preference() -> None:
    expected = Preference((USER,), (ANSWER,), (Message("assistant", "No."),))
    as_text = {"prompt": USER.content, "chosen": ANSWER.content, "rejected": "No."}
    answers = {"chosen": [ANSWER._asdict()], "rejected": [{"role": "assistant", "content": "No."}]}
    with_prompt = {name: [USER._asdict(), *found] for name, found in answers.items()}
    for record in (as_text, {"prompt": [USER._asdict()], **answers}, {"prompt": USER.content, **with_prompt}):
        assert parsed(record) == expected


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"messages": []}, "messages: expected a list of messages .*found an empty one"),
        ({"messages": "hello"}, "messages: expected a list of messages .*found 'hello'"),
        ({"messages": [USER._asdict()]}, "message 1: expected an answer of the assistant at the end, found the user"),
        ({"messages": [ANSWER._asdict()]}, "message 1: expected the user, found the assistant"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages: message 1: expected a text as content, found"),
        ({"messages": [{"role": "user", "content": None}]}, "messages: message 1: expected a text as content, found None"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages: message 1: expected role to be system, user or assistant"),
        ({"messages": [{"role": "user"}]}, "messages: message 1: expected the fields role and content, found the fields role"),
        ({"messages": [USER._asdict() | {"tool_calls": [1]}]}, "messages: message 1: .*alone, found tool_calls as well"),
        ({"prompt": "a", "completion": 5}, "completion: expected a text, found 5"),
        ({"prompt": "a", "completion": None}, "expected a conversation, by the fields messages; .*found the fields prompt"),
        ({"question": "a", "answer": "b"}, "expected a conversation, by the fields messages; .*found the fields question, answer"),
        ({"chosen": "a", "rejected": "b"}, "expected the fields prompt, chosen and rejected, found no prompt"),
        (["a"], "expected an object, found "),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named_with_its_line(
    record: Any, fault: str, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "chats.jsonl", [RECORDS["messages"]] * 3 + [record])
    with pytest.raises(UserError, match=rf"^{path}: line 4: {fault}.*bad-records skip$") as error:
        load(tmp_path, path, small_tokenizer)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("tokens/*"))
    assert not (tmp_path / "tokenizer.model").exists()
    found = load(tmp_path, path, small_tokenizer, bad_records="skip", train_size=1.0)
    assert found.tokens.manifest.documents == {"train": 3, "eval": 0}
    assert found.tokens.manifest.skipped_records == 1 and "line 4" in found.tokens.manifest.skipped_examples[0]


def test_a_preference_is_nothing_for_next_token_training(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match=r"line 1: expected a conversation, found a preference .*--train.objective dpo"):
        load(tmp_path, path, small_tokenizer)


def test_held_out_conversations_are_nothing_for_preferences(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    held_out = write(tmp_path / "b.jsonl", [RECORDS["messages"]])
    args = DataArgs(
        path, eval_filepath=held_out, tokenizer_model_path=str(small_tokenizer.model_path), chat_template="llama2"
    )
    talking = Talking(ChatSetup(has_none=True), "the model", LENGTH, preferences=True)
    with pytest.raises(UserError, match=rf"^data\.eval_filepath: expected preferences .* in {held_out}; give others"):
        load_data(args, tmp_path / "tokens", tmp_path / "tokenizer.model", talking=talking)


def test_unknown_fields_of_a_file_are_named_with_what_is_known(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    known = r"or conversations \(messages; conversations; prompt, completion; .* chosen, rejected\)"
    with pytest.raises(
        UserError, match=rf"{known}, found JSON lines with the fields question, answer from line 1 on: {path}; "
    ):
        load(tmp_path, path, small_tokenizer)


def test_texts_stay_texts_and_are_not_mixed_with_conversations(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.jsonl", [{"text": "an owl", "messages": [USER._asdict()]}])
    assert [(f.field, f.chats) for f in find_files(str(tmp_path / "a.jsonl")).files] == [("text", "")]
    assert find_files(str(tmp_path / "a.jsonl")).notes == [
        "records have text and messages: text is taken; --data.text-field messages takes these"
    ]
    chosen = find_files(str(tmp_path / "a.jsonl"), text_field="messages").files
    assert [(f.field, f.chats) for f in chosen] == [("messages", "messages")]
    write(tmp_path / "b.jsonl", [RECORDS["messages"]])
    with pytest.raises(UserError, match=r"expected texts or conversations, found both: .*a\.jsonl is text, .*b\.jsonl"):
        load(tmp_path, tmp_path, small_tokenizer)
    with pytest.raises(
        UserError, match=r"^data.eval_filepath: expected text, as data.filepath has, found conversations"
    ):
        load(tmp_path, tmp_path / "a.jsonl", small_tokenizer, eval_filepath=str(tmp_path / "b.jsonl"))


def test_records_with_a_text_beside_say_how_to_take_their_conversation(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """As Stanford Alpaca's have it: instruction, input, output, and all of them as a text."""
    for kind, fields in (
        ("instruction and output", "instruction,output"),
        ("prompt and completion", "prompt,completion"),
    ):
        path = write(tmp_path / "a.jsonl", [RECORDS[kind] | {"text": "an owl"}])
        assert find_files(path).notes == [
            f"records have text and {fields}: text is taken; --data.text-field {fields} takes these"
        ]
        data = load(tmp_path / kind, path, small_tokenizer, train_size=1.0, text_field=fields)
        assert data.tokens.manifest.chats is not None and data.tokens.manifest.chats.kinds == {kind: 1}
        assert "[[ An owl. </s>]]" in marked(streams(data)[0], 0, small_tokenizer)


def test_fields_that_are_asked_for_are_taken_of_records_of_another_kind(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """As sets of preferences have it, which also have messages."""
    record = RECORDS["messages"] | {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert isinstance(parsed(record), Preference)
    path = write(tmp_path / "a.jsonl", [record, record])
    data = load(tmp_path, path, small_tokenizer, train_size=1.0, text_field="messages")
    assert data.tokens.manifest.chats is not None and data.tokens.manifest.chats.kinds == {"messages": 2}
    path = write(tmp_path / "a.jsonl", [record, {"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match="line 2: expected the fields messages; found the fields prompt, completion"):
        load(tmp_path, path, small_tokenizer, text_field="messages")


def told(data: Data, batch_size: int = 1) -> dict[str, str]:
    """What a run prints of its conversations."""
    return dict(chat_rows(data, Config(train=replace(TrainArgs(), batch_size=batch_size)), LENGTH))


@pytest.mark.parametrize("form", ["a.jsonl", "a.parquet", "a.arrow"])
def test_fields_that_are_not_read_are_named(form: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    records = [RECORDS["messages"] | {"tools": "[...]", "prompt": "Who?", "source": "web"}] * 2
    if form == "a.jsonl":
        write(tmp_path / form, records)
    elif form == "a.parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / form)
    else:
        table = pa.Table.from_pylist(records)
        with pa.OSFile(str(tmp_path / form), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    rows = told(load(tmp_path, tmp_path / form, small_tokenizer, train_size=1.0))
    assert sorted(rows["not read"].removeprefix("the fields ").removesuffix(" of records").split(", ")) == [
        "id", "prompt", "source", "tools"
    ]  # fmt: skip
    write(tmp_path / "b.jsonl", [RECORDS["instruction and output"] | {"source": None}])
    assert "not read" not in told(load(tmp_path / "b", tmp_path / "b.jsonl", small_tokenizer, train_size=1.0))


@pytest.mark.parametrize("kind", RECORDS)
def test_a_text_in_the_field_system_is_the_system_message(
    kind: str, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    system = Message("system", "Be brief.")
    record = RECORDS[kind] | {"system": system.content}
    assert parsed(record) == Conversation(kind, (system, USER, ANSWER))
    assert parsed(RECORDS[kind] | {"system": "  "}) == parsed(RECORDS[kind] | {"system": None}) == parsed(RECORDS[kind])
    data = load(tmp_path, write(tmp_path / "a.jsonl", [record, RECORDS[kind]]), small_tokenizer, train_size=1.0)
    assert told(data)["system"] == "the field system of 1 records is their system message"
    assert stored(streams(data)[0])[0] == chat_example(
        small_tokenizer, [system, USER, ANSWER], _llama2(small_tokenizer)
    )


def test_a_field_system_that_contradicts_or_has_no_place_is_refused(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *RECORDS["messages"]["messages"]]
    same = parsed({"messages": messages, "system": "Be brief."})
    assert isinstance(same, Conversation) and [m.role for m in same.messages] == ["system", "user", "assistant"]
    with pytest.raises(UserError, match=r"^system: expected one system message, found a field system and another"):
        parsed({"messages": messages, "system": "Be long."})
    with pytest.raises(UserError, match=r"^system: expected a text, found 3"):
        parsed({"messages": messages, "system": 3})
    with_input = parsed({"instruction": "Translate.", "input": "an owl", "output": "y", "system": "s"})
    assert isinstance(with_input, Conversation)
    assert [m.content for m in with_input.written()] == ["s", "Translate.\n\nan owl", "y"]
    path = write(tmp_path / "a.jsonl", [RECORDS["prompt and completion"] | {"system": "Be brief."}])
    with pytest.raises(UserError, match="line 1: system: expected none, as the layout plain has no place"):
        load(tmp_path, path, small_tokenizer, chat_template="", train_size=1.0)


def test_empty_answers_and_held_out_copies_are_counted(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    empty = {"prompt": "Who?", "completion": "  "}
    path = write(tmp_path / "a.jsonl", [*RECORDS.values(), empty])
    held_out = write(tmp_path / "b.jsonl", [RECORDS["messages"], empty, {"prompt": "New?", "completion": "Yes."}])
    rows = told(load(tmp_path, path, small_tokenizer, eval_filepath=held_out))
    assert rows["empty"] == "warning: 2 answers are empty, and teach the model to say nothing"
    assert rows["copies"].startswith("warning: 2 of 3 held-out records are among those to train on")
    rows = told(
        load(tmp_path / "fine", write(tmp_path / "c.jsonl", [*RECORDS.values()]), small_tokenizer, train_size=1.0)
    )
    assert not {"empty", "copies", "system", "prompts"} & {*rows}


def test_a_set_of_wrong_records_alone_says_what_is_wrong_with_them(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": 3}, {"messages": []}])
    with pytest.raises(
        UserError, match=rf"found none in {path} \(2 wrong: .*line 1: .*found 3; .*line 2: .*; give more"
    ):
        load(tmp_path, path, small_tokenizer, bad_records="skip")


def test_a_set_that_is_smaller_than_a_batch_is_told(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    data = load(tmp_path, write(tmp_path / "a.jsonl", [RECORDS["messages"]]), small_tokenizer, train_size=1.0)
    assert "a batch of 8 reads all of them 8 times (--train.batch-size 1)" in told(data, 8)["packing"]
    assert "warning" not in told(data, 1)["packing"]


def test_every_form_of_records_gives_the_same_tokens(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """JSON lines, an array, parquet and arrow, compressed, a folder: in any of the spellings."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    expected = chat_example(small_tokenizer, [USER, ANSWER], _llama2(small_tokenizer))
    for kind, record in RECORDS.items():
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        write(folder / "a.jsonl", [record])
        (folder / "b.json").write_text(json.dumps([record]))
        (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode() + b"\n"))
        pa.parquet.write_table(pa.Table.from_pylist([record]), folder / "d.parquet")
        with (
            pa.OSFile(str(folder / "e.arrow"), "wb") as file,
            pa.ipc.new_stream(file, pa.Table.from_pylist([record]).schema) as out,
        ):
            out.write_table(pa.Table.from_pylist([record]))
        found, _ = streams(load(folder, folder, small_tokenizer, train_size=1.0))
        assert stored(found) == [expected] * 5


def _llama2(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer, LLAMA2, "llama2", tokens_of(tokenizer))


def test_all_conversations_are_there_as_training_sees_them(
    chats: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    data = load(tmp_path, chats, small_tokenizer, length=512)
    train, held_out = streams(data)
    records = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    expected = [chat_example(small_tokenizer, messages, _llama2(small_tokenizer)) for messages in records]
    assert sorted(stored(train) + stored(held_out)) == sorted(expected)
    assert 10 < held_out.count < 60
    counts = data.tokens.manifest.chats
    assert counts is not None and counts.targets["train"] == sum(sum(c[1:]) for _, c in stored(train))
    # The same conversation is on the same side whatever is around it.
    again, _ = streams(
        load(
            tmp_path / "half",
            write(tmp_path / "half.jsonl", [{"messages": m} for m in records[::2]]),
            small_tokenizer,
            length=512,
        )
    )
    assert {repr(pair) for pair in stored(again)} <= {repr(pair) for pair in stored(train)}
    # What another process opens is the same.
    other = open_data(
        DataArgs(str(chats), chat_template="llama2"),
        tmp_path / "tokens",
        tmp_path / "tokenizer.model",
        Talking(ChatSetup(), "", 512),
    )
    assert stored(streams(other)[0]) == stored(train)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["llama2", "zephyr"])
def test_the_tokens_are_the_same_for_any_number_of_processes(
    chats: Path, tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def written(name: str, workers: int) -> dict[str, bytes]:
        args = DataArgs(str(chats), tokenizer_model_path=str(small_tokenizer.model_path), chat_template=form)
        folder = tmp_path / name
        folder.mkdir()
        talking = Talking(ChatSetup(has_none=True), "the model", LENGTH)
        load_data(args, folder / "tokens", folder / "tokenizer.model", workers, talking=talking)
        return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}

    one = written("one", 1)
    monkeypatch.setattr(chat_workers, "TOGETHER", 7)
    monkeypatch.setattr(chat_workers, "WORTH_PROCESSES", 7)
    monkeypatch.setattr(chat_workers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert written("three", 3) == one


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_record_that_is_wrong_is_named_whichever_process_finds_it(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(chat_workers, "TOGETHER", 2)
    monkeypatch.setattr(chat_workers, "WORTH_PROCESSES", 2)
    monkeypatch.setattr(chat_workers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    tagged = {"messages": [{"role": "user", "content": "[INST]"}, ANSWER._asdict()]}
    records: list[Any] = [*[RECORDS["messages"]] * 9, tagged, {"messages": []}, *[RECORDS["messages"]] * 9]
    args = DataArgs(
        write(tmp_path / "a.jsonl", records),
        tokenizer_model_path=str(small_tokenizer.model_path),
        chat_template="llama2",
    )
    talking = Talking(ChatSetup(has_none=True), "the model", LENGTH)
    with pytest.raises(UserError, match=r"a\.jsonl: line 10: message 1: expected text without \[INST\]"):
        load_data(args, tmp_path / "tokens", tmp_path / "tokenizer.model", workers, talking=talking)
    skipping = replace(args, bad_records="skip")
    data = load_data(skipping, tmp_path / "tokens", tmp_path / "tokenizer.model", workers, talking=talking)
    assert isinstance(data, Data)
    assert data.tokens.manifest.skipped_records == 2
    assert [example.split(": ")[1] for example in data.tokens.manifest.skipped_examples] == ["line 10", "line 11"]


def test_an_epoch_reads_every_conversation_once_and_only_answers_count(
    chats: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    train, _ = streams(load(tmp_path, chats, small_tokenizer))
    per_epoch, batch_size = train.sequences(LENGTH), 4
    steps = -(-3 * per_epoch // batch_size)
    rows: list[PackedBatch] = []
    for batch in train_batches(train, batch_size, LENGTH, 0, 0, steps):
        assert isinstance(batch, PackedBatch)
        rows += [PackedBatch(*row) for row in zip(*batch, strict=True)]
    expected = sorted((tuple(ids[:-1]), tuple(ids[1:]), tuple(counts[1:])) for ids, counts in stored(train))
    orders = []
    for epoch in range(3):
        found = []
        for row in rows[epoch * per_epoch : (epoch + 1) * per_epoch]:
            for segment in np.unique(row.segments):
                at = np.flatnonzero(row.segments == segment)
                assert (np.diff(at) == 1).all() and (row.positions[at] == np.arange(len(at))).all()
                if row.weights[at].any():
                    found.append((tuple(row.inputs[at]), tuple(row.targets[at]), tuple(row.weights[at])))
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]
    # Any step, and any rows of it, are the same when read alone.
    (alone,) = train_batches(train, batch_size, LENGTH, 0, 5, 6, np.array([1, 3]))
    for array, row in zip(alone, range(5), strict=True):
        assert (array == np.stack([rows[5 * batch_size + r][row] for r in (1, 3)])).all()
    padding = np.mean([(row.weights.size - sum(len(e[0]) for e in expected) / per_epoch) / LENGTH for row in rows[:1]])
    assert padding == pytest.approx(train.packing(LENGTH).padding)


def test_an_evaluation_reads_every_held_out_conversation_once(
    chats: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    _, held_out = streams(load(tmp_path, chats, small_tokenizer))
    for rows in (1, 3, 16):
        batches = list(eval_batches(held_out, rows, LENGTH))
        assert all(batch.inputs.shape == (rows, LENGTH) for batch in batches)
        weights = sum(float(batch.weights.sum()) for batch in batches)
        assert weights == sum(sum(counts[1:]) for _, counts in stored(held_out))


@pytest.mark.parametrize(
    ("too_long", "loss_on"), [("cut", "answers"), ("drop", "answers"), ("cut", "all"), ("drop", "all")]
)
def test_long_conversations_are_cut_or_dropped_and_counted(
    too_long: str, loss_on: str, chats: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    length = 24
    records = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    examples = [chat_example(small_tokenizer, messages, _llama2(small_tokenizer)) for messages in records]
    data = load(tmp_path, chats, small_tokenizer, length, too_long=too_long, loss_on=loss_on, train_size=1.0)
    train, _ = streams(data)
    longer = [len(ids) > length + 1 for ids, _ in examples]
    kept = [
        (ids[: length + 1], counts[: length + 1])
        for (ids, counts), long in zip(examples, longer, strict=True)
        if not long or too_long == "cut"
    ]
    counting = [pair for pair in kept if loss_on == "all" or any(pair[1][1:])]
    assert stored(train) == counting and 0 < len(counting) <= 300 and any(longer)
    counts = data.tokens.manifest.chats
    assert counts is not None
    assert counts.dropped["train"] == sum(longer) * (too_long == "drop")
    assert counts.without_target["train"] == len(kept) - len(counting)
    targets = sum(len(ids) - 1 for ids, _ in counting) if loss_on == "all" else sum(sum(c[1:]) for _, c in counting)
    assert counts.targets["train"] == targets
    assert sum(float(b.weights.sum()) for b in eval_batches(train, 4, length)) == targets


def test_a_model_without_a_template_gets_a_layout_or_is_asked_for_one(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    for kind, layout in (("prompt and completion", "plain"), ("instruction and output", "instruction")):
        path = write(tmp_path / "a.jsonl", [RECORDS[kind]])
        data = load(tmp_path / layout, path, small_tokenizer, chat_template="", train_size=1.0)
        assert data.chat is not None and data.chat.template == NAMED[layout].template
        assert any(f"written in the layout {layout}" in note for note in data.notes)
    text = marked(streams(data)[0], 0, small_tokenizer)
    assert text == "<s>### Instruction:\nWho are you?\n\n### Response:\n[[An owl.</s>]]\n\n"
    path = write(tmp_path / "a.jsonl", [RECORDS["messages"]])
    with pytest.raises(
        UserError, match=r"^data.chat_template: expected a model with a chat template, .*llama2, llama3, .* or a file$"
    ):
        load(tmp_path / "none", path, small_tokenizer, chat_template="")
    with pytest.raises(UserError, match=r"^--data.chat-template: expected a file or one of llama2"):
        load(tmp_path / "none", path, small_tokenizer, chat_template="lama2")
    with pytest.raises(UserError, match=r"line 2: expected records of one kind, .*found instruction and output"):
        load(
            tmp_path / "two",
            write(tmp_path / "b.jsonl", [RECORDS["prompt and completion"], RECORDS["instruction and output"]]),
            small_tokenizer,
            chat_template="",
        )


def test_settings_or_files_that_change_encode_again_and_a_run_that_began_refuses(
    chats: Path, tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tmp_path, chats, small_tokenizer)
    stamp = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    load(tmp_path, chats, small_tokenizer)
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == stamp
    again = load(tmp_path, chats, small_tokenizer, loss_on="all")
    assert again.tokens.manifest.chats != first.tokens.manifest.chats
    args = DataArgs(str(chats), chat_template="llama2")
    began = {"": first.tokens.manifest.origin}
    for changes, length, expected in (
        ({"too_long": "drop"}, LENGTH, "data.too_long was cut and is drop now"),
        ({"chat_template": "plain"}, LENGTH, "data.chat_template was another one"),
        ({}, LENGTH + 1, "model.max_seq_len was 64 and is 65 now"),
        ({"train_size": 0.5}, LENGTH, "train_size was 0.9 and is 0.5 now"),
    ):
        talking = Talking(ChatSetup(has_none=True), "the model", length)
        with pytest.raises(UserError, match=rf"found that .*{expected}"):
            load_data(
                replace(args, **changes),
                tmp_path / "tokens",
                tmp_path / "tokenizer.model",
                begun=True,
                began_with=began,
                talking=talking,
            )
    path = tmp_path / "tokens" / "counted-train.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"^{path}: expected the mask of these conversations, found another"):
        open_chats(tmp_path / "tokens")
    assert stored(streams(load(tmp_path, chats, small_tokenizer))[0]) == stored(streams(first)[0])


def test_prepare_says_who_reads_conversations(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"^{chats}: expected text, found conversations \(messages\); train.py reads them directly: .*train.py {chats} "
        "--train.init-from CHECKPOINT$",
    ):
        prepare_main(["--filepath", str(chats), "--output", str(tmp_path / "out")])


def test_inspect_says_what_conversations_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [*RECORDS.values(), {"messages": [USER._asdict()]}])
    inspect_main(["--filepath", path])
    said = capsys.readouterr().out
    assert (
        f"{path}: 4 conversations, by their fields: messages (1), conversations (1)" in said and "4 are answers" in said
    )
    assert f"warning: 1 records are wrong: {path}: line 5: message 1: expected an answer" in said
    inspect_main(["--filepath", path, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["conversations"], found["messages"], found["wrong_records"]) == (4, 8, 1)


def test_what_counts_is_shown(chats: Path, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"messages": [Message("system", "Be brief.")._asdict(), USER._asdict(), ANSWER._asdict()] * 1}],
    )
    data = load(tmp_path, path, small_tokenizer, train_size=1.0)
    rows = dict(chat_rows(data, Config(), LENGTH))
    assert "<s>[INST] <<SYS>>" in rows["example"] and "Who are you? [/INST][[ An owl. </s>]]" in rows["example"]
    assert rows["format"] == "llama2" and rows["loss"].startswith("on answers, ")
    assert "1 sequences of 64" in rows["packing"] and rows["too long"].startswith("none (the longest has ")
