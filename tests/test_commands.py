"""The commands, as a user types them: the README's, what they print, and how they end. What they refuse: test_refusals.py."""

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tyro
import zstandard

from llama_jax.checkpoint import save_checkpoint
from tests import bucket, forked, inside
from tests.commands import ROOT, SHORT_RUN, SMALL, SMALL_MODEL, STORIES, run, told
from tests.data.test_token_files import llm_c, megatron, nano_gpt
from tests.generation.models import never_ending
from tests.generation.test_infill import code_tokenizer
from tests.processes import free_address
from tests.programs import ON_DISK


def test_the_first_minute_says_what_it_does_what_it_needs_and_what_to_type_next(place: Path) -> None:
    result = run(["train.py", *SMALL, *STORIES, "--train.save-dir", "again"], place)
    for words in ("parameters", "tokens to train on", "held out", "steps of", "mesh: one device", "attention: ", "run folder",
                  "floor", "bits per byte", "memory", "compiled in", "to go", "  | Once upon a time", "best: step", "losses.png",
                  "metrics.jsonl", f"python {ROOT}/sample.py --ckpt again"):  # fmt: skip
        assert words in result.stdout, words
    assert result.stderr == "", "nothing but errors goes there, where it is no terminal"
    assert "\r" not in result.stdout


def documented_commands() -> list[str]:
    """The python commands of the README and of docs/, in their order, without repetitions.

    Blocks that name a language are of another place: a cluster's, or another program's.
    """
    texts = [(ROOT / "README.md").read_text(), *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    found: dict[str, None] = {}
    for text in texts:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        parts = [*(block for language, block in blocks if not language), *re.findall(r"`(python [^`]+)`", text)]
        for line in "\n".join(parts).replace("\\\n", " ").splitlines():
            line = re.sub(r"\s*(\[.*?\]|#.*)", "", line).strip()
            if re.match(r"(echo .*\| )?python (-m llama_jax|train|sample|convert)", line):
                found[line] = None
    return list(found)


@pytest.fixture
def stored() -> Iterator[bucket.Bucket]:
    with bucket.running() as running:
        yield running


def make_corpora(place: Path, stored: bucket.Bucket) -> None:
    """Put texts, records, and token files of other programs, where the pages have them."""
    texts = [f"The fox went to the river. The owl said: {i} boats!" for i in range(80)]
    records = "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()
    (place / "corpus").mkdir(exist_ok=True)
    (place / "corpus" / "a.txt").write_text("<|endoftext|>".join(texts))
    (place / "web").mkdir(exist_ok=True)
    (place / "web" / "a.jsonl").write_bytes(records)
    (place / "held_out.jsonl.zst").write_bytes(zstandard.compress(records))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place / "a.parquet")
    stored.write("corpus/a.parquet", (place / "a.parquet").read_bytes(), {})
    (place / "fineweb").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place / "fineweb" / "a.parquet")
    (place / "books.jsonl.gz").write_bytes(gzip.compress(records.replace(b"content", b"text")))
    ids = np.random.default_rng(0).integers(3, 200, 4000)
    (place / "data" / "openwebtext").mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin"):
        nano_gpt(place / "data" / "openwebtext" / name, ids)
    llm_c(place / "fineweb_train_000001.bin", ids)
    megatron(place / "my_text_document", [ids[:1000], ids[1000:]])


def program_of(argv: list[str]) -> list[str]:
    return argv[:3] if argv[:2] == ["-m", "llama_jax.data"] else argv[:2] if argv[0] == "-m" else argv[:1]


def compiled_settings(argv: list[str]) -> set[str]:
    """The program and its flags, but for those of which no compiled program knows."""
    program = " ".join(program_of(argv))
    unknown = {f"--train.{name.replace('_', '-')}" for name in ON_DISK}
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    return {program, *(f"{program} {flag}" for flag in flags - unknown)}


def test_every_documented_commands_flags_are_understood(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command ends, with status 0, when its flags are read."""

    def read_and_end(*args: Any, **kwargs: Any) -> None:
        begun.append(args)
        original(*args, **kwargs)
        raise SystemExit(0)

    begun, original = list[Any](), tyro.cli
    monkeypatch.setattr(tyro, "cli", read_and_end)
    for count, line in enumerate(documented_commands(), start=1):
        result = inside.run(shlex.split(line.rpartition("| ")[2])[1:], place)
        assert (result.returncode, result.stderr) == (0, "") and len(begun) == count, f"{line}\n{result.stderr}"


@pytest.mark.parametrize(
    "of_each", ["the first", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_every_documented_command_runs(of_each: str, place: Path, stored: bucket.Bucket, tmp_path: Path) -> None:
    """Trainings are cut to a few steps of a small model, and installing is left to CI.

    Of each program the first command is run, in this process, which leaves plan to its own tests; or all are: each program is
    started once, then forked. A program or a flag that no command before had is compiled as for users, the rest as
    tests/conftest.py has it: nine tenths of a short training as users have it is compiling. gs://bucket is that of
    tests/bucket.py.
    """
    place = shutil.copytree(place, tmp_path / "place", symlinks=True)  # what the commands write is in nobody's way
    for source, output, to in (
        ("runs/tiny", "llama-2-7b", "meta"),
        ("llama-2-7b", "Llama-2-7b-hf", "huggingface"),
        ("llama-2-7b", "checkpoints/llama-2-7b-chat", "llama-jax"),
        ("llama-2-7b", "checkpoints/llama-2-7b", "llama-jax"),
        ("llama-2-7b", "checkpoints/zephyr", "llama-jax"),
        ("runs/tiny", "stories", "llama2c"),
    ):
        argv = ["convert_torch_weights.py", "--input", source, "--output", output, "--to", to]
        # Meta's vocabulary implies the first of these, and files of Hugging Face's bring them.
        argv += ["--chat-template", "llama2"] * output.endswith("-chat") + ["--chat-template", "zephyr"] * (
            "zephyr" in output
        )
        result = forked.run(argv, place)
        assert result.returncode == 0, result.stderr
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "A"}] for i in range(30)]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    if of_each == "all":
        # The base of Meta's chat model here has the parameters of the other one, whose adapter it therefore is, too.
        adapters = [
            "--train.init-from",
            "checkpoints/llama-2-7b-chat",
            "--lora.rank",
            "4",
            "--train.save-dir",
            "runs/tuned",
        ]
        result = forked.run(["train.py", "--data.filepath", "chats.jsonl", *SHORT_RUN, *adapters], place)
        assert result.returncode == 0, result.stderr
    (place / "stories" / "model.bin").rename(place / "stories15M.bin")
    (place / "code").mkdir(exist_ok=True)
    model = never_ending(code_tokenizer(place / "code"), max_seq_len=128)
    save_checkpoint(place / "checkpoints" / "code-llama-7b", model.params, model.args, model.tokenizer)
    make_corpora(place, stored)
    pairs = [{"prompt": f"{i}", "chosen": "A", "rejected": "B"} for i in range(30)]
    (place / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (place / "conversation.json").write_text('[{"role": "user", "content": "Hi"}]')
    (place / "prompts.jsonl").write_text('{"prompt": "The fox"}\n{"prompt": "The owl", "stop": ["."], "n": 3}\n')
    commands = documented_commands()
    assert len(commands) >= 20
    begun: list[list[str]] = []
    met: set[str] = set()
    there = stored.environment | {"XDG_CACHE_HOME": str(place / "cache")}
    for i, line in enumerate(commands):
        echoed, _, command = line.rpartition("| ")
        argv = shlex.split(command)[1:]
        program = program_of(argv)
        known = program in begun
        begun.append(program)
        settings = compiled_settings(argv)
        as_users = of_each == "all" and not settings <= met
        met |= settings
        of_parts = {"merge", "--part"} & {*argv}  # one of several commands
        if of_each == "the first" and (known or of_parts or "llama_jax.plan" in program):
            continue
        if of_stable := bool({"--train.schedule", "--train.decay-run"} & {*argv}):  # in a hundredth of the steps
            argv = [str(int(each) // 100) if each.isdecimal() else each for each in argv]
            argv += [*SMALL_MODEL, *STORIES, "--train.batch-size=2", "--train.eval-iters=1", "--train.warmup-steps=1"]
        of_recipe = {"--minutes", "--train.minutes"} & {*argv}  # of a moment, in which a small model is chosen
        argv = ["0.01" if before in of_recipe else each for before, each in zip(["", *argv], argv, strict=False)]
        if "--topology" in argv and "llama_jax.recipe" in argv and importlib.util.find_spec("libtpu") is None:
            continue
        if "--train.minutes" in argv:
            argv += ["--train.save-dir", f"documented/{i}"]
        elif argv[0] == "train.py" and not of_stable:
            tunes = "configs/chat-tiny.toml" in argv  # the small model of this place, with room for a conversation
            argv += [] if "--train.init-from" in argv or tunes else SMALL_MODEL
            argv += ["--model.max-seq-len=256", "--data.chats=40"] if tunes else []
            argv += [*SHORT_RUN, "--train.max-steps=3"]  # with one evaluation
            argv += ["--train.gradient-accumulation-steps", "1"]
            argv += [] if "--data.mixture" in argv or tunes else ["--train.save-dir", f"documented/{i}"]  # others go on
            # runs/tuned, as it is made above, has a smaller rank.
            argv += ["--lora.rank", "4"] if "--train.objective" in argv else []
            argv += ["--train.profile-steps", "2-3"] if "--train.profile-steps" in argv else []
            if "--data.tokenizer-model-path" not in argv and not {"tokens", "--data.mixture"} & {*argv} and not tunes:
                argv += STORIES
        if "llama_jax.plan" in argv:
            if importlib.util.find_spec("libtpu") is None:
                continue
            argv += ["--model.dim=256", "--model.n-heads=2", "--model.n-layers=1", "--model.max-seq-len=256"]
            argv += ["--model.vocab-size=512", *["--compiles=1"] * ("--search" in argv)]
            argv += ["--topology", "v5e:2x2", "--train.batch-size", "8", "--train.gradient-accumulation-steps", "1"]
        if argv[0] == "convert_torch_weights.py" and "--output" in argv:
            shutil.rmtree(place / argv[argv.index("--output") + 1], ignore_errors=True)
        if "gs://bucket/tokens" in argv:
            for path in (place / "tokens").iterdir():
                stored.write(f"tokens/{path.name}", path.read_bytes(), {})
        execute = inside.run if of_each == "the first" else forked.run if known else run
        stdin = shlex.split(echoed)[1] + "\n" if echoed else "Hi\n"
        # The TPU's compiler ends the process on a flag that it does not know.
        environment = {"XLA_FLAGS": ""} if as_users or "llama_jax.plan" in argv else {}
        result = execute(argv, place, stdin, environment | (there if "gs://" in line else {}))
        assert result.returncode == 0, f"{line}\n{result.stderr}"


@pytest.mark.slow
def test_the_recipe_for_two_processes_on_one_machine_runs(place: Path) -> None:
    (recipe,) = re.findall(r"```\n(for i in .*?)```", (ROOT / "docs" / "launch.md").read_text(), re.DOTALL)
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *SMALL, *STORIES])
    script = recipe.replace("python train.py", command).replace("127.0.0.1:9876", free_address())
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert done.stdout.count("run folder  runs/two") == done.stdout.count("mesh: data 2") == 1, "process 0 alone prints"
    assert len((place / "runs" / "two" / "metrics.jsonl").read_text().splitlines()) == 6


def test_sample_prints_a_text_a_prompt(place: Path) -> None:
    one = inside.run(["sample.py", "--ckpt", "runs/tiny", "Once upon", "--max-new-tokens", "8"], place)
    assert one.returncode == 0 and one.stdout.startswith("Once upon") and one.stdout.endswith("\n")
    assert re.fullmatch(
        r"\d+ tokens? in [\d.]+ s: first after .* s, then .* tokens/s, .*B/s of memory read\n", one.stderr
    )
    two = inside.run(["sample.py", "--ckpt", "runs/tiny", "Once upon", "The", "--max-new-tokens", "8"], place)
    first, second = two.stdout.split("\n---\n")
    assert first.rstrip("\n") == one.stdout.rstrip("\n")
    assert second.startswith("The")


def test_json_has_a_line_a_prompt_with_the_documented_fields(place: Path) -> None:
    argv = ["sample.py", "--ckpt", "runs/tiny", "--json", "--max-new-tokens", "5", "--temperature", "0"]
    given = inside.run([*argv, "Once upon", "é 🦊", ""], place)
    piped = inside.run(argv, place, stdin="Once upon\né 🦊\n\n")
    lines = [json.loads(line) for line in given.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["Once upon", "é 🦊", ""]
    assert given.stdout.splitlines()[:2] == piped.stdout.splitlines()
    for line in lines:
        assert list(line) == ["prompt", "completion", "prompt_tokens", "completion_tokens", "finish_reason", "logprobs"]
        assert line["completion_tokens"] == len(line["logprobs"]) <= 5 and line["finish_reason"] in ("stop", "length")
        assert all(isinstance(p, float) and p <= 0 for p in line["logprobs"])
    assert lines[2]["prompt_tokens"] == 1  # BOS


def test_ascii_terminals_closed_streams_and_broken_pipes_are_survived(place: Path) -> None:
    sample = f"{sys.executable} {ROOT / 'sample.py'} --ckpt runs/tiny --max-new-tokens 8"

    def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=place, capture_output=True, text=True, env=env
        )

    ascii_only = shell(f"{sample} 'é 🦊' $'a\\xff'", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0 and ascii_only.stdout.startswith(r"\xe9 \U0001f98a")
    assert "expected one or more" in told(shell(f"{sample} <&-"))
    assert shell(f"{sample} a >&-").returncode == 0
    # The reader has gone before the first line is written.
    broken = shell(f"mkfifo gone; {sample} a b c --json > gone & exec 3< gone; exec 3<&-; wait $!")
    assert (broken.returncode, broken.stderr) == (141, "")


def expected_fields(record: dict[str, Any]) -> bool:
    needed = {"step", "tokens", "train_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second"}
    return needed <= set(record)


def test_metrics_are_one_object_a_logged_step(place: Path) -> None:
    lines = (place / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(map(expected_fields, records))
    assert all(("eval_loss" in r) == ("eval_bits_per_byte" in r) == (r["step"] in (3, 6)) for r in records)
