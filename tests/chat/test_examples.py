"""What counts in the loss: the tokens that generation would have to produce, and no other, in every format."""

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import pytest
import sentencepiece as spm

from llama_jax.chat.examples import chat_example, chat_examples
from llama_jax.chat.formats import ChatFormat, tokens_of
from llama_jax.chat.ids import Growing
from llama_jax.chat.messages import Message
from llama_jax.chat.named import LLAMA2, NAMED
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.chat.vocabularies import CHATML, LLAMA3, Vocabulary

Example = tuple[list[int], list[int]]
LETTERS = "abcxyz ABC 0123 .,:?!'\"\n\t <|>[]/ éüß 你好 🙂 ─"


def conversation(rng: random.Random, tags: Sequence[str]) -> list[Message]:
    """Some turns, perhaps behind a system message; answers may be empty, and texts hold what looks like tokens."""

    def text(empty: bool = False) -> str:
        words = [
            "".join(rng.choices(LETTERS, k=rng.randrange(1, 9))) for _ in range(rng.randrange(0 if empty else 1, 6))
        ]
        return " ".join(words + rng.choices(tags, k=rng.random() < 0.2) if tags else words)

    system = [Message("system", text())] * (rng.random() < 0.4)
    turns = [(Message("user", text()), Message("assistant", text(empty=True))) for _ in range(rng.randrange(1, 4))]
    return system + [message for turn in turns for message in turn]


def joined(parts: Sequence[tuple[list[int], int]]) -> Example:
    return [i for ids, _ in parts for i in ids], [counts for ids, counts in parts for _ in ids]


def literal_llama2(sp: spm.SentencePieceProcessor, messages: Sequence[Message]) -> Example:
    system = messages[0].content if messages[0].role == "system" else None
    turns = list(messages[system is not None :])
    parts: list[tuple[list[int], int]] = []
    for n, (user, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        asked = user.content if n or system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user.content}"
        prompt = f"[INST] {asked.strip()} [/INST]"
        whole, fed = sp.encode(f"{prompt} {answer.content.strip()} "), sp.encode(prompt)
        parts += [([sp.bos_id(), *fed], 0), ([*whole[len(fed) :], sp.eos_id()], 1)]
    return joined(parts)


def test_in_llama2s_format_answers_and_their_eos_count(small_tokenizer: Tokenizer) -> None:
    sp = spm.SentencePieceProcessor(model_proto=small_tokenizer.model_bytes)
    chat = ChatFormat(small_tokenizer, LLAMA2, "llama2", tokens_of(small_tokenizer))
    rng = random.Random(0)
    for _ in range(300):
        messages = conversation(rng, ["<s>", "</s>", "[IN ST]"])
        ids, counts = chat_example(small_tokenizer, messages, chat)
        assert (ids, counts) == literal_llama2(sp, messages)
        assert ids == chat.encode_answered(messages)
        as_generation_is_fed(chat, messages, ids, counts)


def test_llama2s_vocabulary_has_llama2s_format_by_default(llama2_tokenizer: Tokenizer) -> None:
    sp = spm.SentencePieceProcessor(model_proto=llama2_tokenizer.model_bytes)
    rng = random.Random(1)
    for _ in range(300):
        messages = conversation(rng, ["<s>", "</s>"])
        as_dicts = [message._asdict() for message in messages]
        assert chat_example(llama2_tokenizer, as_dicts) == literal_llama2(sp, messages)


def test_another_vocabulary_needs_a_format_which_may_be_named(small_tokenizer: Tokenizer, tmp_path: Any) -> None:
    messages = [Message("user", "the owl"), Message("assistant", "a fox")]
    with pytest.raises(
        UserError, match=r"^chat_format: expected one beside a tokenizer that is not LLaMA 2's"
    ) as error:
        chat_example(small_tokenizer, messages)
    assert "\n" not in str(error.value)
    (tmp_path / "own.jinja").write_text(NAMED["zephyr"].template)
    for name, template in (("llama2", LLAMA2), (str(tmp_path / "own.jinja"), NAMED["zephyr"].template)):
        wanted = ChatFormat(small_tokenizer, template, name, tokens_of(small_tokenizer))
        assert chat_example(small_tokenizer, messages, name) == chat_example(small_tokenizer, messages, wanted)
    with pytest.raises(UserError, match=r"^chat_format: expected a file or one of llama2"):
        chat_example(small_tokenizer, messages, "lama2")


def as_generation_is_fed(chat: ChatFormat, messages: Sequence[Message], ids: list[int], counts: list[int]) -> None:
    """Each answer begins right behind what generation is fed for it, and ends with the token that ends a turn."""
    runs = "".join(map(str, counts))
    at = 0
    for i, message in enumerate(messages):
        if message.role == "assistant":
            fed = chat.encode(messages[:i])
            assert ids[: len(fed)] == fed
            assert runs.index("1", at) == len(fed)
            at = runs.find("0", len(fed))
            at = len(runs) if at < 0 else at
            assert ids[at - 1] in chat.end_ids
    assert "1" not in runs[at:]


Encode = Callable[[str], list[int]]


def chatml(of: dict[str, int], encode: Encode, messages: Sequence[Message]) -> list[tuple[list[int], int]]:
    parts: list[tuple[list[int], int]] = []
    for n, (role, content) in enumerate(messages):
        parts += [(encode("\n") if n else [], 0), ([of["<|im_start|>"]], 0)]
        parts += (
            [(encode(f"{role}\n"), 0), (encode(content), 1), ([of["<|im_end|>"]], 1)]
            if role == "assistant"
            else [([*encode(f"{role}\n{content}"), of["<|im_end|>"]], 0)]
        )
    return [*parts, (encode("\n"), 0)]


def llama3(of: dict[str, int], encode: Encode, messages: Sequence[Message]) -> list[tuple[list[int], int]]:
    parts = [([of["<|begin_of_text|>"]], 0)]
    for role, content in messages:
        parts.append(([of["<|start_header_id|>"], *encode(role), of["<|end_header_id|>"], *encode("\n\n")], 0))
        parts.append(([*encode(content.strip()), of["<|eot_id|>"]], int(role == "assistant")))
    return parts


def zephyr(of: dict[str, int], encode: Encode, messages: Sequence[Message]) -> list[tuple[list[int], int]]:
    parts: list[tuple[list[int], int]] = []
    for n, (role, content) in enumerate(messages):
        head = ("\n" if n else "") + f"<|{role}|>\n"
        answers = [(encode(head), 0), ([*encode(content), of["</s>"]], 1)]
        parts += answers if role == "assistant" else [([*encode(head + content), of["</s>"]], 0)]
    return [*parts, (encode("\n"), 0)]


def vicuna(of: dict[str, int], encode: Encode, messages: Sequence[Message]) -> list[tuple[list[int], int]]:
    usual = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions."
    )
    system = messages[0].content.strip() if messages[0].role == "system" else usual
    turns = [message for message in messages if message.role != "system"]
    parts: list[tuple[list[int], int]] = [([of["<s>"]], 0)]
    for n, (user, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        head = "" if n else f"{system} "
        parts.append((encode(f"{head}USER: {user.content.strip()} ASSISTANT:"), 0))
        parts.append(([*encode(f" {answer.content.strip()}"), of["</s>"]], 1))
    return parts


@pytest.mark.parametrize(
    ("name", "specials", "literal"),
    [("chatml", CHATML, chatml), ("llama3", LLAMA3, llama3), ("zephyr", CHATML, zephyr), ("vicuna", CHATML, vicuna)],
)
def test_in_other_formats_answers_and_their_last_token_count(name: str, specials: Sequence[str], literal: Any) -> None:
    vocabulary: Any = Vocabulary(specials)
    chat = ChatFormat(vocabulary, NAMED[name].template, name, tokens_of(vocabulary))
    rng = random.Random(2)
    for n in range(300):
        messages = conversation(rng, specials)
        example = chat_example(vocabulary, messages, chat)
        assert example == joined(
            literal(vocabulary.specials, lambda text: vocabulary.encode(text, bos=False), messages)
        )
        if n < 60:
            assert example[0] == chat.encode_answered(messages)
            as_generation_is_fed(chat, messages, *example)


def test_an_answer_that_the_tokenizer_would_join_to_its_prompt_is_encoded_by_itself() -> None:
    """Generation is fed "assistant:", and cannot turn the end of it into another token."""
    template = "{%- for m in messages -%}{{- m.role + ':' + m.content + (eos_token if m.role == 'assistant' else ';') -}}{%- endfor -%}"
    template += "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
    vocabulary: Any = Joining()
    chat = ChatFormat(vocabulary, template, "joining", {"eos_token": "</s>"})
    messages = [Message("user", "a"), Message("assistant", ":b")]
    fed = chat.encode(messages[:1])
    assert chat.encode_answered(messages)[: len(fed)] != fed
    ids, counts = chat_example(vocabulary, messages, chat)
    assert ids == [*fed, ord(":"), ord("b"), vocabulary.eos_id]
    assert counts == [0] * len(fed) + [1, 1, 1]
    with pytest.raises(UserError, match=r"^message 4: expected a template that keeps earlier messages"):
        chat_example(vocabulary, [*messages, *messages], chat)


class Joining:
    """A tokenizer with a token for each character, for "</s>", and for two colons."""

    specials: ClassVar = {"</s>": 1}
    bos_id = eos_id = 1
    vocab_size, adds_bos = 1 << 16, False

    def is_text(self, token_id: int) -> bool:
        return token_id != 1

    def piece(self, token_id: int) -> str:
        return "</s>" if token_id == 1 else chr(token_id)

    def encode(self, text: str, bos: bool = True, eos: bool = False, specials: bool = False) -> list[int]:
        ids: list[int] = []
        while text:
            first = next((token for token in ("</s>", "::") if text.startswith(token)), text[0])
            ids.append({"</s>": 1, "::": 2}.get(first) or ord(first))
            text = text[len(first) :]
        return ids

    def encode_parts(self, parts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        return [self.encode(part) for part in parts]


FORGETTING = (
    "{%- for m in messages -%}{%- if loop.last or m.role == 'user' -%}{{- '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant ' -}}{%- endif -%}"
)
UNENDED = "{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
PAIR = [Message("user", "Who are you?"), Message("assistant", "An owl.")]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (FORGETTING, PAIR * 2, "message 4: expected a template that keeps earlier messages as they are, .*make a record of each answer"),
        (UNENDED, PAIR, "message 2: expected a special token behind the answer, .*choose a format"),
        (NAMED["chatml"].template, PAIR[:1], "message 1: expected an answer of the assistant at the end, found the user; add the answer"),
        (NAMED["chatml"].template, PAIR[1:], "message 1: expected the user, found the assistant; correct the order"),
        (NAMED["chatml"].template, [PAIR[0], *PAIR], "message 2: expected the assistant, found the user; correct"),
        (NAMED["chatml"].template, [*PAIR, PAIR[1]], "message 3: expected the user, found the assistant; correct"),
        (NAMED["chatml"].template, [*PAIR, Message("system", "x"), *PAIR], "message 3: .*system messages come first, found the system"),
        (NAMED["chatml"].template, [], "messages: expected a list of messages"),
        (NAMED["chatml"].template, [{"role": "user", "content": 5}], "messages: message 1: expected a role and a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_in_one_line(template: str, messages: list[Any], expected: str) -> None:
    vocabulary = cast(Any, Vocabulary(CHATML))
    chat = ChatFormat(vocabulary, template, "the template", tokens_of(vocabulary))
    with pytest.raises(UserError, match=f"^{expected}") as error:
        chat_example(vocabulary, messages, chat)
    assert "\n" not in str(error.value)


def test_what_does_not_count_of_a_forgetting_template_is_right_for_one_answer() -> None:
    vocabulary = cast(Any, Vocabulary(CHATML))
    chat = ChatFormat(vocabulary, FORGETTING, "the template", tokens_of(vocabulary))
    as_generation_is_fed(chat, PAIR, *chat_example(vocabulary, PAIR, chat))


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2s_tags_in_a_text_are_refused(tag: str, small_tokenizer: Tokenizer) -> None:
    chat = ChatFormat(small_tokenizer, LLAMA2, "llama2", tokens_of(small_tokenizer))
    with pytest.raises(UserError, match=r"^message 2: expected text without "):
        chat_example(small_tokenizer, [PAIR[0], Message("assistant", f"a {tag} b")], chat)


def test_the_plain_layout_is_the_text_and_what_follows_it(small_tokenizer: Tokenizer) -> None:
    """So that sample.py, without --chat, is fed the same tokens."""
    chat = ChatFormat(small_tokenizer, NAMED["plain"].template, "plain", tokens_of(small_tokenizer))
    ids, counts = chat_example(small_tokenizer, [Message("user", "The owl\n"), Message("assistant", "laughed.")], chat)
    fed = small_tokenizer.encode("The owl\n")
    assert ids == [*small_tokenizer.encode("The owl\nlaughed."), small_tokenizer.eos_id] and ids[: len(fed)] == fed
    assert counts == [0] * len(fed) + [1] * (len(ids) - len(fed))


@pytest.mark.parametrize("specials", [CHATML, LLAMA3, ("</s>", "<s>", "<s><s>", "a")])
def test_a_text_that_grows_has_the_ids_that_it_has_whole(specials: Sequence[str], small_tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for tokenizer in (cast(Tokenizer, Vocabulary(specials)), small_tokenizer):
        pieces = [*tokenizer.specials, *LETTERS, "owl ", "\n", "<s", "s>"]
        for _ in range(150):
            growing, text = Growing(tokenizer), ""
            for _ in range(5):
                text = text[: rng.randrange(len(text) // 2, len(text) + 1)] if rng.random() < 0.3 else text
                text += "".join(rng.choices(pieces, k=rng.randrange(6)))
                assert growing.encode(text) == tokenizer.encode(text, bos=False, specials=True)


def test_conversations_are_encoded_together_as_one_by_one(small_tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    many = [conversation(rng, ["<s>", "</s>", "[INST]"]) for _ in range(60)]
    many.insert(7, [Message("user", "no answer")])
    for name in ("llama2", "zephyr"):
        chat = ChatFormat(small_tokenizer, NAMED[name].template, name, tokens_of(small_tokenizer))
        together = chat_examples(chat, many)
        assert any(isinstance(one, UserError) for one in together)
        for messages, found in zip(many, together, strict=True):
            alone = ChatFormat(small_tokenizer, NAMED[name].template, name, tokens_of(small_tokenizer))
            try:
                assert chat_example(small_tokenizer, messages, alone) == found
            except UserError as error:
                assert str(error) == str(found)
