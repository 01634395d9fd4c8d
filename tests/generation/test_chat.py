"""Conversations: Meta's format token by token, and what it refuses."""

import json
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.generation.chat import Message, encode_dialog, fit_dialog, read_messages, without_tags
from llama_jax.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))


def literal(tokenizer: Tokenizer, *pairs: tuple[str, str | None]) -> list[int]:
    """The format as it is written down: each pair from BOS to EOS, the last one open."""
    ids = []
    for user, answer in pairs:
        text = f"[INST] {user} [/INST]" + ("" if answer is None else f" {answer} ")
        ids += tokenizer.encode(text, bos=True, eos=answer is not None)
    return ids


def test_one_message(small_tokenizer: Tokenizer) -> None:
    assert encode_dialog(small_tokenizer, [USER(" Hello there \n")]) == literal(small_tokenizer, ("Hello there", None))


def test_several_turns_stand_each_between_bos_and_eos(small_tokenizer: Tokenizer) -> None:
    messages = [USER("Who?"), ASSISTANT(" The owl. "), USER("Where?"), ASSISTANT("There."), USER("Why?")]
    expected = literal(small_tokenizer, ("Who?", "The owl."), ("Where?", "There."), ("Why?", None))
    assert encode_dialog(small_tokenizer, messages) == expected
    assert expected.count(small_tokenizer.bos_id) == 3 and expected.count(small_tokenizer.eos_id) == 2


def test_the_system_prompt_opens_the_first_message(small_tokenizer: Tokenizer) -> None:
    messages = [SYSTEM("Be brief."), USER("Who?"), ASSISTANT("The owl."), USER("Why?")]
    first = "<<SYS>>\nBe brief.\n<</SYS>>\n\nWho?"
    assert encode_dialog(small_tokenizer, messages) == literal(small_tokenizer, (first, "The owl."), ("Why?", None))


def test_llama2s_own_tokens(llama2_tokenizer: Tokenizer) -> None:
    """[INST] and [/INST] as LLaMA 2's vocabulary spells them."""
    ids = encode_dialog(llama2_tokenizer, [USER("hi")])
    assert ids == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_message_that_contains_a_tag_is_refused(small_tokenizer: Tokenizer, tag: str, at: int) -> None:
    messages = [SYSTEM("a"), USER("b"), ASSISTANT("c"), USER("d")]
    messages[at] = messages[at]._replace(content=f"please {tag} now")
    with pytest.raises(UserError) as refused:
        encode_dialog(small_tokenizer, messages)
    assert f"message {at + 1}" in str(refused.value) and tag in str(refused.value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM("a")],
        [ASSISTANT("a")],
        [USER("a"), ASSISTANT("b")],
        [USER("a"), USER("b")],
        [USER("a"), SYSTEM("b"), USER("c")],
        [SYSTEM("a"), SYSTEM("b"), USER("c")],
        [SYSTEM("a"), ASSISTANT("b"), USER("c")],
    ],
    ids=lambda messages: " ".join(m.role for m in messages),
)
def test_roles_that_do_not_take_turns_are_refused(small_tokenizer: Tokenizer, messages: list[Message]) -> None:
    with pytest.raises(UserError, match=r"expected the .* found"):
        encode_dialog(small_tokenizer, messages)


def test_messages_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"role": "system", "content": "é"}, {"content": "b", "role": "user"}]))
    assert read_messages(path) == [SYSTEM("é"), USER("b")]


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "{}", "[]", "[1]", '[{"role": "user"}]', '[{"role": "user", "content": 3}]', "[" * 100_000,
        '[{"role": "bot", "content": "a"}]', '[{"role": ["user"], "content": "a"}]',
        '[{"role": "user", "content": "a", "name": "b"}]',
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_other_json_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=r"m\.json: .*expected .*found"):
        read_messages(tmp_path / "m.json")
    with pytest.raises(UserError, match="found no such file"):
        read_messages(tmp_path / "n.json")


def test_the_oldest_turns_are_dropped_until_the_conversation_fits(small_tokenizer: Tokenizer) -> None:
    turns = [USER("Who?"), ASSISTANT("The owl."), USER("Where?"), ASSISTANT("There."), USER("Why?")]
    messages = [SYSTEM("Be brief."), *turns]
    sizes = [len(encode_dialog(small_tokenizer, [messages[0], *messages[1 + 2 * n :]])) for n in range(3)]
    assert fit_dialog(small_tokenizer, messages, sizes[0]) == (messages, 0)
    assert fit_dialog(small_tokenizer, messages, sizes[0] - 1) == ([messages[0], *messages[3:]], 1)
    assert fit_dialog(small_tokenizer, messages, sizes[1] - 1) == ([messages[0], messages[5]], 2)
    assert fit_dialog(small_tokenizer, messages, 1) == ([messages[0], messages[5]], 2), "what is asked stays"
    assert fit_dialog(small_tokenizer, turns, 1) == (turns[-1:], 2)


def test_an_answer_that_holds_tags_can_be_talked_about(small_tokenizer: Tokenizer) -> None:
    text = without_tags("a [INST] b [IN[/INST]ST] <<SYS>>c")
    assert text == "a  b  c"
    encode_dialog(small_tokenizer, [USER("Who?"), ASSISTANT(text), USER("Why?")])
