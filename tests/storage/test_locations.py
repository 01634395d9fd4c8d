"""Checkpoints in object storage (tests/bucket.py), as a user has them: what is saved, killed, resumed, loaded and refused."""

import importlib.util
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts

import llama_jax
from llama_jax.checkpoint import Checkpoint, steps_of
from llama_jax.convert import ConvertArgs, convert
from llama_jax.errors import STOPPED, UserError
from llama_jax.storage import owner
from llama_jax.storage.locations import children, kvstore, location
from tests import bucket, forked, inside
from tests.commands import SMALL_MODEL, STORIES, told
from tests.survival import outcome, same

# Steps 4, 8 and 12 are saved, 8 and 12 evaluated.
FLAGS = [*SMALL_MODEL, *STORIES, "--train.max-steps=12", "--train.batch-size=2", "--train.eval-interval=8", "--train.eval-iters=1",
         "--train.log-interval=1", "--train.save-interval=4"]  # fmt: skip
REFUSED = "someone@example.com does not have storage.objects.list access to the Google Cloud Storage bucket."


@pytest.fixture(scope="module")
def stored() -> Iterator[bucket.Bucket]:
    """The bucket of this file: a process finds one only, and goes on with it."""
    with bucket.running() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(autouse=True)
def served(stored: bucket.Bucket) -> Iterator[None]:
    yield
    stored.refusal, stored.before_write = None, lambda name: None


def train(run: Path, *flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = inside.run(["train.py", *FLAGS, "--train.save-dir", str(run), *flags], run.parent)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on disk that nobody touched."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(run)
    return run


def upload(stored: bucket.Bucket, folder: Path, name: str) -> None:
    """What gcloud storage cp -r does."""
    for path in folder.rglob("*"):
        if path.is_file():
            stored.write(f"{name}/{path.relative_to(folder)}", path.read_bytes(), {})


def steps_in(stored: bucket.Bucket, folder: str) -> set[str]:
    """Every step of which there is anything."""
    return {name.split("/")[1] for name in stored.objects if name.startswith(f"{folder}/")} - {owner.NAME}


def test_a_run_that_is_killed_while_it_saves_and_stopped_ends_as_one_on_disk_that_nobody_touched(
    stored: bucket.Bucket, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = ["train.py", *FLAGS, "--train.save-dir", str(run), "--train.checkpoint-dir", "gs://bucket/run"]

    def kill(name: str) -> None:
        if name == "run/8/commit_success.txt":
            fork.kill()
            raise ConnectionAbortedError  # it did not arrive

    fork = forked.Fork(argv, tmp_path)
    stored.before_write = kill
    fork.communicate(timeout=60)
    assert fork.returncode == -signal.SIGKILL
    assert steps_in(stored, "run") == {"4", "8"} and steps_of(run) == [4], "8 lacks its mark alone"
    assert Checkpoint.find("gs://bucket/run").folder.name == "4"
    with pytest.raises(UserError, match="gs://bucket/run/8: expected a whole checkpoint, found no commit_success"):
        Checkpoint.find("gs://bucket/run/8")

    def stop(name: str) -> None:
        if name.startswith("run/8/"):
            stored.before_write = lambda name: None
            fork.terminate()

    fork = forked.Fork(argv, tmp_path)
    stored.before_write = stop
    out, _ = fork.communicate(timeout=60)
    assert fork.returncode == STOPPED and "saved; rerun the same command to resume" in out
    train(run, "--train.checkpoint-dir", "gs://bucket/run")
    assert (run / "checkpoints").read_text() == "gs://bucket/run\n"

    (records, *arrays), (expected, *others) = outcome(run), outcome(reference)
    assert records == expected
    assert all(same(a, b) for a, b in zip(arrays, others, strict=True)), "parameters and optimizer's state, bit for bit"
    assert steps_of(run) == steps_of(reference)
    assert steps_in(stored, "run") == set(map(str, steps_of(reference))), "nothing is left of the others"

    last = {name for name in stored.objects if name.startswith("run/12/")}
    train(run, "--train.checkpoint-dir", "gs://bucket/run", "--train.resume-step", "8")
    assert outcome(run)[0] == expected, "back at step 8, and forth again"
    aside = {name for name in stored.objects if name.startswith("run/set-aside-1/")}
    assert aside == {name.replace("run/", "run/set-aside-1/", 1) for name in last}


@pytest.mark.parametrize("folder", ["copied", "copied/checkpoints", "copied/checkpoints/BEST", "int8"])
def test_a_checkpoint_in_a_bucket_loads_as_on_disk(
    folder: str, stored: bucket.Bucket, reference: Path, tmp_path: Path
) -> None:
    best = Checkpoint.find(reference).folder
    source = reference
    if folder == "int8":
        source = tmp_path / "int8"
        convert(ConvertArgs(str(best), str(source), weights="int8"))
    upload(stored, source, folder.split("/")[0])
    found = llama_jax.load(f"gs://bucket/{folder.replace('BEST', best.name)}")
    expected = llama_jax.load(str(source))
    assert found.args == expected.args and found.tokenizer.model_bytes == expected.tokenizer.model_bytes
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_command_takes_a_checkpoint_in_a_bucket(stored: bucket.Bucket, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a fox.\n" * 20)
    upload(stored, reference, "copied")
    commands = [
        ["sample.py", "Once upon", "--max-new-tokens=8", "--quiet", "--ckpt=gs://bucket/copied"],
        ["-m", "llama_jax.evaluate", "--text=text.txt", "--ckpt=gs://bucket/copied"],
        ["train.py", *FLAGS, "--train.init-from=gs://bucket/copied", "--train.max-steps=1", "--train.save-dir=tuned"],
        ["convert_torch_weights.py", "--input=gs://bucket/copied", "--output=hf", "--to=huggingface"],
    ]
    for fork in [forked.Fork(argv, tmp_path) for argv in commands]:
        out, err = fork.communicate(timeout=60)
        assert fork.returncode == 0 and out, err
    assert (tmp_path / "tuned" / "tokenizer.model").read_bytes() == (reference / "tokenizer.model").read_bytes()
    convert(ConvertArgs(str(reference), str(tmp_path / "expected"), to="huggingface"))
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_what_tensorstore_wrote_is_seen_in_a_folder_that_was_looked_at_before(stored: bucket.Bucket) -> None:
    folder = location("gs://bucket/looked")
    assert children(folder) == []
    stored.write("looked/", b"", {})  # the placeholder that a click on "create folder" makes
    assert children(folder) == []
    (folder / "a").write_text("1")
    assert children(folder) == [folder / "a"]
    ts.KvStore.open(kvstore(folder)).result().write("looked/b", b"2").result()
    assert sorted(children(folder)) == [folder / "a", folder / "looked"]


def test_a_run_that_may_not_look_at_its_checkpoints_does_not_begin_anew(
    stored: bucket.Bucket, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in reference.glob("*.*"):
        (run / path.name).write_bytes(path.read_bytes())
    (run / "checkpoints").write_text("gs://bucket/seen\n")
    upload(stored, reference / "checkpoints", "seen")
    before, records = dict(stored.objects), (run / "metrics.jsonl").read_text()
    stored.refusal = 403, REFUSED
    line = told(train(run, status=2))
    assert line.startswith("error: train.checkpoint_dir: gs://bucket/seen: expected") and REFUSED in line
    with pytest.raises(UserError, match="does not have storage"):
        steps_of(run)
    assert stored.objects == before and (run / "metrics.jsonl").read_text() == records


@pytest.mark.parametrize(
    ("argv", "refusal", "words"),
    [
        (["train.py", "--train.checkpoint-dir=gs://typo/run"], None, "none of the name typo; correct it, or create it"),
        (["train.py", "--train.checkpoint-dir=gs://bucket/new"], (403, REFUSED), f"Forbidden: b/bucket/o {REFUSED}"),
        (["train.py", "--train.checkpoint-dir=gs://bucket/new"], (401, "Anonymous caller"), "gcloud auth application-default"),
        (["train.py", "--train.checkpoint-dir=gs:/bucket/new"], None, "gs:/bucket/new: expected a folder on disk or gs://"),
        (["train.py", "--train.checkpoint-dir=s3://bucket/new"], None, "s3://bucket/new: expected a folder on disk or gs://"),
        (["train.py", "--train.checkpoint-dir=gs://bucket/used"], None, "gs://bucket/used in use"),
        (["train.py", "--train.save-dir=gs://bucket/new"], None, "train.save_dir: expected a folder on disk"),
        (["sample.py", "a", "--ckpt=gs://bucket/typo"], None, "gs://bucket/typo: expected a checkpoint folder, found nothing"),
        (["sample.py", "a", "--ckpt=gs://typo/run"], None, "gs://typo/run: expected a checkpoint folder, found nothing"),
        (["sample.py", "a", "--ckpt=gs://bucket/used/file"], None, "used/file: expected a checkpoint folder, found a file"),
        (["sample.py", "a", "--ckpt=gs://bucket/used"], None, "gs://bucket/used: expected a run folder, a step folder"),
        (["sample.py", "a", "--ckpt=gs://bucket/used"], (403, REFUSED), "that this account has the roles"),
        (["convert_torch_weights.py", "--input=gs://bucket/hf", "--dry-run"], None, "Hugging Face's files on disk"),
        (["convert_torch_weights.py", "--input=a", "--output=gs://bucket/a"], None, "--output: expected a folder on disk"),
        (["-m", "llama_jax.data", "prepare", "--filepath=text.txt", "--output=gs://bucket/a"], None, "--output: expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    argv: list[str], refusal: tuple[int, str] | None, words: str, stored: bucket.Bucket, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time.\n" * 20)
    for name in ("used/file", "hf/config.json"):
        stored.write(name, b"1", {})
    stored.refusal = refusal
    flags = FLAGS + ([] if "save-dir" in argv[1] else ["--train.save-dir=run"])
    line = told(inside.run([*argv, *(flags if argv[0] == "train.py" else [])], tmp_path))
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "run" / "checkpoints").exists(), "the next try may name another place"


def test_gcsfs_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://bucket/run: expected gcsfs, .* pip install -e '\.\[gcs\]'$"):
        location("gs://bucket/run")
