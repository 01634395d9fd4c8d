"""The files that plan writes: never in place of another's."""

from pathlib import Path

import pytest

from llama_jax.config import Config, ModelArgs
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.cost import Cost, Schedule
from llama_jax.plan.outputs import Outputs
from llama_jax.plan.topology import Topology

TOPOLOGY = Topology.parse("v5e:2x2")
FITS = Plan(
    Config(ModelArgs(vocab_size=512)), TOPOLOGY, {"data": 4}, "bfloat16", "splash", 1 << 30,
    {"parameters": 1 << 29, "temporaries": 1 << 29}, Schedule(Cost(), TOPOLOGY.chip), "HloModule step\n", 1.0,
)  # fmt: skip
DOES_NOT_FIT = Plan(
    FITS.config, TOPOLOGY, {"data": 4}, "bfloat16", "splash", 1 << 35, {"parameters": 1 << 35}, None, "", 1.0
)  # fmt: skip


def test_what_plan_wrote_it_replaces(tmp_path: Path) -> None:
    hlo, picture = tmp_path / "new" / "a.hlo", tmp_path / "new" / "plan.png"
    for plan in (FITS, FITS):
        said = Outputs.check(str(hlo), str(picture), asked=True).write(plan)
        assert [name for name, _ in said] == ["text", "picture"]
    assert hlo.read_text() == FITS.text and picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in hlo.parent.iterdir()) == ["a.hlo", "plan.png"]


def test_where_there_is_no_program_that_is_said_and_the_last_one_stays(tmp_path: Path) -> None:
    hlo = tmp_path / "a.hlo"
    hlo.write_text("HloModule of before\n")
    ((name, text),) = Outputs.check(str(hlo), "", asked=True).write(DOES_NOT_FIT)
    assert name == "text" and "not written" in text and "does not fit" in text
    assert hlo.read_text() == "HloModule of before\n"


def test_a_picture_that_nobody_named_is_left_out_where_another_file_has_its_name(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    picture.write_bytes(b"\x89PNG a photograph")
    outputs = Outputs.check("", str(picture), asked=False)
    ((name, text),) = outputs.write(FITS)
    assert name == "picture" and "none is drawn" in text and str(picture) in text
    assert picture.read_bytes() == b"\x89PNG a photograph"


@pytest.mark.parametrize(
    ("hlo", "picture", "parts"),
    [
        ("notes.txt", "", ["--hlo", "notes.txt", "another"]),
        ("", "photo.png", ["--output", "photo.png", "another"]),
        ("", "plan.pdf", ["--output", ".png"]),
        ("folder", "", ["--hlo", "something else"]),
        ("same.png", "same.png", ["--output", "twice"]),
        ("gs://bucket/o.hlo", "", ["--hlo", "on disk"]),
        ("notes.txt/o.hlo", "", ["--hlo", "folder"]),
        ("/dev/null", "", ["--hlo", "something else"]),
    ],
)
def test_another_file_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hlo: str, picture: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "photo.png"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError) as told:
        Outputs.check(hlo, picture, asked=True)
    assert all(part in str(told.value) for part in parts), told.value
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "photo.png").read_text() == "mine"
