"""benchmarks/what_fits.py: the page is its lines, the flags are those of the cells, and a stopped run goes on."""

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_jax import sample
from llama_jax.cli.flags import parse_flags
from llama_jax.config import Config, load_toml
from llama_jax.devices.chips import GiB
from llama_jax.errors import UserError
from llama_jax.plan.topology import Topology
from tests.commands import ROOT
from tests.plan import needs_libtpu

FOLDER = ROOT / "benchmarks"
RECORDS = FOLDER / "records"
PAGE = ROOT / "docs" / "what-fits.md"
NAMES = ("what_fits", "what_fits_cells", "what_fits_page")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module. It imports those beside it by their bare names."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    try:
        import what_fits

        yield what_fits
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            if name not in before:
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cells(script: ModuleType) -> dict[str, Any]:
    return {cell.name: cell for cell in script.all_cells()}


class Compiler:
    """Stands for plan: its figures are those of the plain estimate, times factors. It counts, and may stop the run."""

    def __init__(self, size: float = 1.0, time: float = 2.0, stops_at: int | None = None):
        self.size, self.time, self.stops_at = size, time, stops_at
        self.asked: list[tuple[str, str]] = []

    def __call__(self, cell: Any, answer: Any) -> dict[str, Any]:
        self.asked.append((cell.name, answer.flags))
        if len(self.asked) == self.stops_at:
            raise KeyboardInterrupt
        size = int(self.size * answer.plain.bytes)
        fits = size <= cell.topology.chip.hbm_bytes
        return {
            "fits": fits, "bytes_per_device": size, "step_seconds": self.time * answer.plain.seconds if fits else None,
            "tokens_per_step": answer.tokens, "mesh": {}, "time": "schedule", "compile_seconds": 1.0,
        }  # fmt: skip


def run(script: ModuleType, path: Path, cells: list[Any], compiler: Compiler, minutes: float = math.inf) -> list[Any]:
    """Compile what is missing in a file of lines, as the command does. Return all lines."""
    with script.appending(path) as file:
        lines = list(script.of_now(cells, script.read_lines(path)).values())
        script.compile_missing(cells, lines, file, minutes, 4, compiler)
    return lines


def named(cells: dict[str, Any], *names: str) -> list[Any]:
    return [cells[name] for name in names]


def few(cells: dict[str, Any]) -> list[Any]:
    return named(cells, "1B, adapter tuning, v5e:1x1", "1B, decoding, int8, v5e:1x1", "1B, full tuning, v5e:2x2")


def test_the_page_is_what_the_lines_say(script: ModuleType, cells: dict[str, Any]) -> None:
    compiled = script.of_now(list(cells.values()), script.read_lines(RECORDS / script.COMPILED))
    estimates = script.read_lines(RECORDS / script.ESTIMATES)
    assert sorted(line["cell"] for line in estimates) == sorted(cells)
    assert all(line["asked"] == cells[line["cell"]].asked() for line in estimates)
    assert script.page(list(cells.values()), compiled, estimates) == PAGE.read_text()


def rows_of_page(cells: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """The command, the cell and the flags of every row of the page that has flags."""
    for text in PAGE.read_text().split("\n### ")[1:]:
        model, task = re.match(r"(\w+): .*, ([a-z ]+)\n", text).groups()  # type: ignore[union-attr]
        command = next(iter(re.findall(r"```bash\n(.*)\n```", text)), "")
        for place, flags in re.findall(r"^\| (\S+:[^|]+) \|.*\| `([^`]*)` \|$", text, re.MULTILINE):
            slice_, _, kind = place.partition(", ")
            yield command, cells[f"{model}, {task}{kind and f', {kind}'}, {slice_}"], flags


def check_row(script: ModuleType, command: str, cell: Any, flags: str) -> None:
    """What a person types must be accepted, with the cell's layout, and the planned step must be that of the command."""
    from what_fits_cells import config_of

    words = shlex.split(f"{command} {flags}")
    chips = cell.topology.device_count
    if cell.task.weights is not None:
        assert words[:2] == ["python", "sample.py"]
        typed = parse_flags(sample.Arguments, words[2:], sample.Arguments(), "sample.py", "")
        sizes = dataclasses.asdict(typed.mesh)
        assert typed.weights == cell.task.weights and chips % math.prod(sizes.values()) == 0
        return
    planned = config_of(f"{cell.asked()} {flags}")
    assert words[:2] == ["python", "train.py"]
    file = Config()
    if "--config" in words:
        at = words.index("--config")
        file = load_toml(ROOT / "configs" / f"{words[at + 1]}.toml")
        del words[at : at + 2]
    typed = parse_flags(Config, words[2:], file, "train.py", "")
    sizes = [size for size in dataclasses.asdict(typed.mesh).values() if size != -1]
    assert math.prod(sizes) == chips == math.prod(dataclasses.asdict(planned.mesh).values())
    assert [typed.mesh.fsdp, typed.mesh.tensor, typed.mesh.sequence] == [
        planned.mesh.fsdp, planned.mesh.tensor, planned.mesh.sequence,
    ]  # fmt: skip
    for name in ("batch_size", "gradient_accumulation_steps", "remat", "param_dtype", "moments", "optimizer"):
        assert getattr(typed.train, name) == getattr(planned.train, name), name
    assert (typed.lora.rank, typed.lora.base_weights) == (planned.lora.rank, planned.lora.base_weights)
    if not typed.train.init_from:
        assert dataclasses.replace(typed.model, vocab_size=planned.model.vocab_size) == planned.model


def test_the_flags_of_a_row_are_typed_as_they_stand_and_are_those_of_its_cell(
    script: ModuleType, cells: dict[str, Any]
) -> None:
    """A row of each model and task; all rows are read by the slow test."""
    first: dict[tuple[str, str], tuple[str, Any, str]] = {}
    for row in rows_of_page(cells):
        first.setdefault((row[1].model.name, row[1].task.family), row)
    assert len(first) == 24
    for command, cell, flags in first.values():
        check_row(script, command, cell, flags)


@pytest.mark.slow
def test_the_flags_of_every_row_are_those_of_its_cell(script: ModuleType, cells: dict[str, Any]) -> None:
    rows = list(rows_of_page(cells))
    assert len(rows) > 200
    for command, cell, flags in rows:
        check_row(script, command, cell, flags)


def test_what_people_want_first_is_compiled_first_and_no_cell_is_twice(script: ModuleType) -> None:
    found = script.all_cells()
    assert found[0].name == "7B, pretraining, v5e:16x16" and len({cell.name for cell in found}) == len(found)
    assert {cell.model.name for cell in found} == {"1B", "3B", "7B", "13B", "34B", "70B"}
    assert all(Topology.parse(cell.slice).is_offered for cell in found)


def test_a_run_that_is_stopped_goes_on_with_what_is_missing(
    script: ModuleType, cells: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, wanted = tmp_path / "records" / "compiled.jsonl", few(cells)
    with pytest.raises(KeyboardInterrupt):
        run(script, path, wanted, Compiler(stops_at=2))
    (line,) = path.read_text().splitlines()
    path.write_text(path.read_text() + line[: len(line) // 2])  # a kill in the middle of a line
    capsys.readouterr()
    compiler = Compiler()
    lines = run(script, path, wanted, compiler)
    assert [name for name, _ in compiler.asked] == [cell.name for cell in wanted[1:]], "the first is not compiled again"
    said = capsys.readouterr().out
    assert "cut off by a stop" in said and "2 of 2" in said and "cells an hour" in said and "to go" in said
    assert path.read_text().splitlines()[0] == line
    assert [json.loads(each) for each in path.read_text().splitlines()] == lines and len(lines) == 3
    again = Compiler()
    assert run(script, path, wanted, again) == lines and not again.asked


def test_no_cell_is_begun_when_the_time_is_over(script: ModuleType, cells: dict[str, Any], tmp_path: Path) -> None:
    compiler = Compiler()
    assert run(script, tmp_path / "compiled.jsonl", few(cells), compiler, minutes=0.0) == [] == compiler.asked


def test_what_fails_for_want_of_memory_here_is_left_for_another_run_and_other_failures_are_lines(
    script: ModuleType, cells: dict[str, Any], tmp_path: Path
) -> None:
    path, wanted = tmp_path / "what-fits.jsonl", few(cells)[1:2]
    killed, refused = "error: plan: expected memory for the compiler, found too little", "error: plan: expected luck"
    assert run(script, path, wanted, lambda cell, answer: killed) == []  # type: ignore[arg-type, return-value]
    (line,) = run(script, path, wanted, lambda cell, answer: refused)  # type: ignore[arg-type, return-value]
    assert script.TOO_LITTLE in (ROOT / "llama_jax" / "plan" / "apart.py").read_text()
    assert line["fits"] is None and line["why"] == refused and len(path.read_text().splitlines()) == 1


def test_two_runs_do_not_write_the_same_file(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "compiled.jsonl"
    refused = pytest.raises(UserError, match=r"^--records: expected a file that nobody else writes")
    with script.appending(path), refused, script.appending(path):
        pass
    with script.appending(path):
        pass


def test_lines_of_other_settings_do_not_count_and_those_of_other_versions_are_not_mixed_silently(
    script: ModuleType, cells: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, wanted = tmp_path / "compiled.jsonl", few(cells)[:1]
    (line,) = run(script, path, wanted, Compiler())
    done = script.of_now(wanted, [line])
    capsys.readouterr()
    script.check_versions(done, mix=False)
    assert capsys.readouterr().out == ""
    assert script.of_now(wanted, [line | {"asked": f"{line['asked']} --train.batch-size 32"}]) == {}
    other = {line["cell"]: line | {"versions": line["versions"] | {"jax": "0.0.1"}}}
    with pytest.raises(UserError, match=r"^--records: expected .*found 1 with jax 0\.0\.1; give --mix"):
        script.check_versions(other, mix=False)
    script.check_versions(other, mix=True)
    assert "1 with jax 0.0.1 are kept" in capsys.readouterr().out
    script.check_versions({line["cell"]: line | {"source": "another"}}, mix=False)
    assert "1 of 1 compiled cells are of other sources" in capsys.readouterr().out


def test_words_that_no_cell_has_are_refused_though_others_are_found(script: ModuleType, cells: dict[str, Any]) -> None:
    every = list(cells.values())
    found = script.chosen_by(["13B, decoding", "7B, pretraining, v5e:16x16", "13B"], every)
    assert found[0].name.startswith("13B, decoding") and len(found) == len(set(found))
    assert script.chosen_by(None, every) == every
    with pytest.raises(UserError, match=r"^--only: expected words of a cell's name, .* found '7b'$"):
        script.chosen_by(["13B", "7b"], every)


def test_other_records_leave_the_page_of_the_repository_alone(script: ModuleType, tmp_path: Path) -> None:
    assert script.arguments([]).docs == ROOT / "docs"
    assert script.arguments(["--records", str(ROOT / "benchmarks" / "records")]).docs == ROOT / "docs"
    assert script.arguments(["--records", str(tmp_path)]).docs == tmp_path
    assert script.arguments(["--records", str(tmp_path), "--docs", "here"]).docs == Path("here")


def test_what_is_no_line_is_refused_by_its_number(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "compiled.jsonl").write_text('{"cell": "a", "asked": "b"}\n{"other": 1}\n')
    with pytest.raises(UserError, match=r"^--records: expected a cell a line, found something else in line 2 of"):
        script.read_lines(tmp_path / "compiled.jsonl")


def test_where_the_compiler_needs_more_than_expected_smaller_settings_are_compiled(
    script: ModuleType, cells: dict[str, Any]
) -> None:
    """The second settings are chosen by what the first ones have shown."""
    (cell,) = named(cells, "7B, adapter tuning, h100:1")
    compiler = Compiler(size=1.6)
    line = script.compiled(cell, [], 4, compiler)
    assert line["fits"] and line["flags"] == compiler.asked[-1][1] and 2 <= len(compiler.asked) <= 4
    assert len(set(compiler.asked)) == len(compiler.asked)
    assert line["bytes"] <= cell.topology.chip.hbm_bytes


def test_what_does_not_fit_is_a_line_with_what_the_smallest_settings_need(
    script: ModuleType, cells: dict[str, Any]
) -> None:
    (cell,) = named(cells, "70B, pretraining, v5e:1x1")
    compiler = Compiler(size=1.1)
    line = script.compiled(cell, [], 4, compiler)
    assert line["fits"] is False and len(compiler.asked) == 1 and line["bytes"] > 30 * cell.topology.chip.hbm_bytes
    assert "DOES NOT FIT" in script.said(cell, line)


def test_a_base_is_quantized_only_where_it_does_not_fit_otherwise(script: ModuleType, cells: dict[str, Any]) -> None:
    small, large = named(cells, "7B, adapter tuning, v5e:1x1", "7B, adapter tuning, h100:1")
    assert "--lora.base-weights int" in script.training_answer(small, []).flags
    assert "base-weights" not in script.training_answer(large, []).flags


def test_compiled_cells_correct_the_estimates_of_the_others_and_tell_their_errors(
    script: ModuleType, cells: dict[str, Any]
) -> None:
    """A compiler whose figures are the estimate's times the same factors leaves no error."""
    from what_fits_cells import estimates

    wanted = named(
        cells, "1B, full tuning, v5e:2x2", "1B, full tuning, v5e:2x4", "3B, full tuning, v5e:2x4",
        "1B, decoding, int8, v5e:1x1", "1B, decoding, int8, v5e:2x2", "7B, decoding, int8, v5e:1x1",
    )  # fmt: skip
    lines, compiler = list[Any](), Compiler(size=0.9, time=3.0)
    for cell in wanted:
        lines.append(script.compiled(cell, lines, 4, compiler))
    targets = named(cells, "7B, full tuning, v5e:4x4", "3B, decoding, int8, v5e:1x1", "7B, full tuning, h100:8")
    before = {line["cell"]: line for line in estimates(targets, [])}
    after = {line["cell"]: line for line in estimates(targets, lines)}
    for cell in targets[:2]:
        old, new = before[cell.name], after[cell.name]
        assert old["errors"] == {} and new["errors"]["seconds"]["count"] == 3
        assert new["errors"]["seconds"]["largest"] < 0.03 and new["errors"]["bytes"]["largest"] < 0.03
        if old["flags"] == new["flags"]:
            assert new["step_seconds"] == pytest.approx(3.0 * old["step_seconds"], rel=0.03)
            assert new["bytes"] == pytest.approx(0.9 * old["bytes"], rel=0.03)
    gpu = targets[2].name
    assert after[gpu] == before[gpu], "a TPU's schedule corrects no GPU's lower bound"


def test_the_page_says_of_each_row_whether_it_is_compiled(script: ModuleType, cells: dict[str, Any]) -> None:
    from what_fits_cells import estimates

    wanted = named(
        cells, "7B, decoding, int8, v5e:1x1", "7B, decoding, int4, v5e:1x1", "7B, decoding, bfloat16, v5e:1x1"
    )
    line = script.compiled(wanted[0], [], 4, Compiler())
    text = script.page(wanted, {line["cell"]: line}, list(estimates(wanted, [line])))
    (int8,) = re.findall(r"^\| v5e:1x1, int8 .*$", text, re.MULTILINE)
    (int4,) = re.findall(r"^\| v5e:1x1, int4 .*$", text, re.MULTILINE)
    assert "**compiled**" in int8 and "~" not in int8 and f"{line['bytes'] / GiB:.2f} of 15.75 GiB" in int8
    assert "estimate" in int4 and int4.count("~") == 3
    assert "**1 of 3 cells are compiled**" in text and "Does not fit: v5e:1x1, bfloat16 (needs" in text
    failed = line | {"fits": None, "why": "plan: expected luck"}
    text = script.page(wanted, {line["cell"]: failed}, list(estimates(wanted, [])))
    assert (
        "**0 of 3 cells are compiled**" in text
        and "The compiler fails on 7B, decoding, int8, v5e:1x1: plan: expected luck" in text
    )


def test_the_picture_is_drawn_of_the_lines(script: ModuleType, cells: dict[str, Any], tmp_path: Path) -> None:
    estimates = script.read_lines(RECORDS / script.ESTIMATES)
    script.draw(list(cells.values()), {}, estimates, tmp_path / "what-fits.png")
    assert (tmp_path / "what-fits.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["what-fits.png"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("task", ["full tuning", "adapter tuning", "decoding, int8"])
def test_plan_compiles_what_a_line_says(script: ModuleType, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    from what_fits_cells import TASKS, Cell, Model

    monkeypatch.setenv("XLA_FLAGS", "")
    shape = "--model.dim 256 --model.n-heads 2 --model.n-kv-heads 2 --model.n-layers 2 --model.hidden-dim 512 --model.max-seq-len 256"
    cell = Cell(Model("0B", "small", "tinyllama-1.1b", shape, "small"), TASKS[task], "v5e:2x2")
    line = script.compiled(cell, [], 1, script.compile_cell)
    assert line["fits"] and 0 < line["bytes"] < cell.topology.chip.hbm_bytes and line["step_seconds"] > 0
    assert line["versions"]["libtpu"] and line["compile_seconds"] > 0
