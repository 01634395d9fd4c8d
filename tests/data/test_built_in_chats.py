"""The built-in conversations: the same everywhere, answered rightly, with held-out people of their own."""

import collections
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from llama_jax.data import built_in_chats as made
from llama_jax.data.built_in_chats import Conversation, chat, chats, is_held_out, is_right, questions, write_chats
from llama_jax.data.stories import story
from llama_jax.data.story_rules import BOYS, GIRLS, RULES, words

TRAIN = list(itertools.islice(chats(0), 2000))
HELD_OUT = list(itertools.islice(chats(0, held_out=True), 1000))
NAMES, ANIMALS = BOYS + GIRLS, words(RULES["animal"])
FRIENDS = "found|hungry|came|gave|friend"
FULL = rf"\b({'|'.join(NAMES)}) ({'|'.join(map(str.capitalize, ANIMALS))})\b"


def text_of(conversation: Conversation) -> str:
    return "\n".join(message["content"] for message in conversation.messages)


def test_a_seed_and_an_index_name_a_conversation_forever() -> None:
    assert chat(0, 3) == chat(0, 3) == TRAIN[3] != chat(1, 3)
    text = "\n\n".join(text_of(one) for one in TRAIN[:50] + HELD_OUT[:50])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "84e703a89aeb6980"
    assert len({text_of(one) for one in TRAIN + HELD_OUT}) > 0.99 * len(TRAIN + HELD_OUT)


def test_held_out_people_meet_in_no_conversation_to_train_on() -> None:
    met = {frozenset(" ".join(found) for found in re.findall(FULL, text_of(one))) for one in TRAIN}
    others = {frozenset(" ".join(found) for found in re.findall(FULL, text_of(one))) for one in HELD_OUT}
    assert all(len(people) == 2 for people in met | others)
    assert not met & others
    assert not any(map(is_held_out, met)) and all(map(is_held_out, others))
    # Each of the two is known from other conversations: what is new is that they meet.
    assert {person for people in others for person in people} <= {person for people in met for person in people}


def test_what_is_held_out_is_what_the_documentation_says() -> None:
    assert is_held_out(frozenset({"Nora Duck", "Max Rabbit"}))
    people = [f"{name} {animal.capitalize()}" for name in NAMES for animal in ANIMALS]
    pairs = [
        frozenset((one, other))
        for one, other in itertools.combinations(people, 2)
        if one.split()[0] != other.split()[0] and one.split()[1] != other.split()[1]
    ]
    assert 0.11 < sum(map(is_held_out, pairs)) / len(pairs) < 0.14


def test_the_user_and_the_assistant_speak_in_turn() -> None:
    for one in TRAIN + HELD_OUT:
        roles = [message["role"] for message in one.messages]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
    counts = collections.Counter(sum(m["role"] == "assistant" for m in one.messages) for one in TRAIN)
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts[i] for i in (1, 2, 3, 4)) > 200
    assert sum(one.messages[0]["role"] == "system" for one in TRAIN) > 200


def test_answers_are_right() -> None:
    """By a reader of its own: the hero is the first one named, the friend the second."""
    read = collections.Counter[str]()
    for one in TRAIN + HELD_OUT:
        first, second = dict.fromkeys(re.findall(FULL, text_of(one)))
        people = dict([first, second])
        short = "one word" in one.messages[0]["content"]
        for asked, answer in zip(one.messages, one.messages[1:], strict=False):
            question, said = re.split(r"(?<=\.) (?=\w)", asked["content"])[-1], answer["content"]
            if asked["role"] != "user" or "Hello, " in asked["content"]:
                continue
            named = next((name for name in people if re.search(rf"\b{name}\b", question)), None)
            if "boy or a girl" in question:
                right = "boy" if named in BOYS else "girl"
            else:
                friends = r"\bI\b|my name" if one.subject == "role" else FRIENDS
                person = second if re.search(friends, question) else first
                right = person[1].lower() if "animal" in question else person[0]
            assert said == right if short else re.search(rf"\b{right}\b", said), (question, said, right)
            read[right] += 1
    assert set(read) == {"boy", "girl", *ANIMALS, *NAMES}


def test_the_model_of_the_first_minute_has_a_token_for_each_character() -> None:
    told = {character for index in range(300) for character in story(0, index).text}
    assert {character for one in TRAIN + HELD_OUT for character in text_of(one)} <= told | {"\n"}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Nora Duck lost it.", True),
        (" nora duck  lost it ", True),
        ("Nora Duck lost it", True),
        ("Nora Duck lost it!", True),
        ("Nora Duck lost it. Max", False),
        ("Nora lost it.", False),
        ("", False),
    ],
)
def test_an_answer_is_judged_without_its_case_and_full_stop(said: str, right: bool) -> None:
    assert is_right(said, "Nora Duck lost it.") is right


def test_questions_are_different_held_out_and_end_with_the_user() -> None:
    asked = questions()
    assert len({json.dumps(one["messages"]) for one in asked}) == len(asked) == made.QUESTIONS == 200
    told = {text_of(one) for one in TRAIN}
    for one in asked:
        text = "\n".join(m["content"] for m in one["messages"])
        assert one["messages"][-1]["role"] == "user" and one["answer"] and text not in told
        assert is_held_out(frozenset(" ".join(found) for found in re.findall(FULL, text + one["answer"])))
    answers = collections.Counter(one["answer"] for one in asked)
    assert answers.most_common(1)[0][1] <= 20  # one answer for all of them would be wrong in nine of ten


def test_files_are_written_once_and_are_records(tmp_path: Path) -> None:
    train, held_out = write_chats(tmp_path / "new", 18)
    lines = [json.loads(line) for line in train.read_text().splitlines()]
    assert lines == [chat(made.SEED, index).record for index in range(18)]
    assert len(held_out.read_text().splitlines()) == 2
    asked = tmp_path / "new" / made.QUESTIONS_FILE
    assert [json.loads(line) for line in asked.read_text().splitlines()] == questions()
    before = [path.stat().st_mtime_ns for path in (train, held_out, asked)]
    assert write_chats(tmp_path / "new", 18) == (train, held_out)
    assert [path.stat().st_mtime_ns for path in (train, held_out, asked)] == before
