"""A folder of texts of one level, in several forms."""

import gzip
import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=10)) for _ in range(700)]
    (folder / "my.txt").write_text("\n".join(lines))
    (folder / "my.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "held_out.txt").write_text("\n".join(reversed(lines[-100:])))
    (folder / "many").mkdir()
    for i, line in enumerate(lines[:150]):
        (folder / "many" / f"{i}.txt").write_text(line)
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 20
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder
