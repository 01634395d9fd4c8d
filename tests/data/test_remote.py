"""Tokens behind an address: the batches of those on disk, whatever the cache, and nothing that is damaged among them."""

import contextlib
import fcntl
import functools
import http.server
import itertools
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llama_jax.config import DataArgs
from llama_jax.data import cache as cache_module
from llama_jax.data import load_data, open_data, open_tokens, shards
from llama_jax.data import places as places_module
from llama_jax.data.batches import eval_batches, train_batches
from llama_jax.data.cache import IN_USE, KEPT, TokenCache
from llama_jax.data.preparing import PrepareArgs, prepare
from llama_jax.data.remote import RemoteStream
from llama_jax.data.tokens import TokenSet, find_prepared
from llama_jax.errors import UserError
from llama_jax.plan.settings import vocabulary
from llama_jax.tokenizer import Tokenizer
from tests import bucket as google
from tests import forked

ADDRESS = "memory://bucket/tokens"
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """Prepared tokens in nine shards of several blocks each."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = random.Random(0)
    words = ["fox", "owl", "river", "boat", "tree", "12", "sea", "ducks"]
    lines = "\n".join(" ".join(rng.choices(words, k=50)) for _ in range(6000))
    (folder / "a.txt").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "TASK_BYTES", 150_000)
        patch.setattr(shards, "TASKS", 10**6)
        prepare(
            PrepareArgs(
                str(folder / "a.txt"),
                tokenizer_model_path=str(small_tokenizer.model_path),
                output=str(folder / "tokens"),
                workers=1,
                separator="\n",
            )
        )
    return folder / "tokens"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama_jax" / "tokens"


@pytest.fixture
def bucket(folder: Path) -> Iterator[Any]:
    """The tokens in a file system in memory."""
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        if path.is_file():
            system.pipe(f"/bucket/tokens/{path.name}", path.read_bytes())
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in memory, where these small tokens would fit."""
    monkeypatch.setattr("llama_jax.data.remote.RECENT", 0)


def batches_of(tokens: TokenSet) -> list[np.ndarray]:
    training = [batch.inputs for batch in train_batches(tokens.train, 4, 300, 7, 0, STEPS)]
    return training + [batch.targets for batch in eval_batches(tokens.eval, 4, 300)]


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@contextlib.contextmanager
def counted(bucket: Any) -> Iterator[list[tuple[str, int | None]]]:
    """Note what is asked for: the names of files, and from which byte on."""
    asked: list[tuple[str, int | None]] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        asked.append((path.rpartition("/")[2], start))
        return original(self, path, start, end, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", cat_file)
        yield asked


@pytest.mark.parametrize("cache_gb", [1.0, 3e-4, 0.0], ids=["all fits", "too small", "none"])
def test_the_batches_of_an_address_are_those_of_the_folder_with_a_cold_and_a_warm_cache(
    folder: Path, bucket: Any, cache: Path, cache_gb: float
) -> None:
    wanted = batches_of(open_tokens(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    for _ in ("cold", "warm"):
        tokens = open_tokens(ADDRESS, cache_gb)
        assert isinstance(tokens.train, RemoteStream) and tokens.manifest == open_tokens(folder).manifest
        assert equal(batches_of(tokens), wanted)
        kept = sum(path.stat().st_blocks * 512 for path in cache.glob(f"*/*{KEPT}"))
        assert kept <= cache_gb * 1e9 and (cache_gb < 1 or kept > size / 2)
    with counted(bucket) as asked:
        assert equal(batches_of(open_tokens(ADDRESS, cache_gb)), wanted)
    parts = [name for name, start in asked if start is not None]
    assert bool(parts) == (cache_gb < 1)


def test_all_that_arrays_do_a_stream_behind_an_address_does_too(folder: Path, bucket: Any) -> None:
    tokens, on_disk = open_tokens(ADDRESS), open_tokens(folder)
    for split in ("train", "eval"):
        stream, array = getattr(tokens, split), np.asarray(getattr(on_disk, split))
        assert np.array_equal(stream, array) and np.array_equal(stream[100_000:], array[100_000:])
        assert stream[-1] == array[-1] and stream[5:5].tolist() == [] and stream.max() == array.max()
    tokens.check()


def test_what_is_fetched_is_fetched_once_by_many_readers(bucket: Any) -> None:
    tokens = open_tokens(ADDRESS)
    with counted(bucket) as asked:
        threads = [threading.Thread(target=lambda: tokens.train[:200_000]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(asked) == len(set(asked))


def load(address: str, run: Path, begun: bool = False, **options: Any) -> Any:
    return load_data(DataArgs(address, **options), run / "tokens", run / "tokenizer.model", begun=begun)


def test_a_run_takes_tokens_at_an_address_as_those_on_a_disk(
    folder: Path, bucket: Any, cache: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    data, on_disk = load(ADDRESS, tmp_path / "1"), load(str(folder), tmp_path / "2")
    assert equal(batches_of(data.tokens), batches_of(on_disk.tokens))
    assert data.source == ADDRESS and data.tokenizer.model_bytes == small_tokenizer.model_bytes
    for name in ("tokens/manifest.json", "tokenizer.model"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    (note,) = data.notes
    assert re.fullmatch(
        rf"{ADDRESS}: [\d.]+ .B of tokens in \d+ files; all are kept in {cache}/\w+, where 0.00 kB are already \(data.cache_gb 100\)",
        note,
    )
    assert load(ADDRESS, tmp_path / "1", begun=True).tokens.manifest == data.tokens.manifest
    other = open_data(DataArgs(ADDRESS), tmp_path / "1" / "tokens", tmp_path / "1" / "tokenizer.model")
    assert np.array_equal(other.tokens.train[:999], data.tokens.train[:999])
    with pytest.raises(UserError, match=rf"data\.separator: expected '\\n', with which the tokens in {ADDRESS} were"):
        load(ADDRESS, tmp_path / "3", separator="<x>")
    with pytest.raises(
        UserError, match="--filepath: expected a text, found tokens that are prepared already in memory"
    ):
        _ = PrepareArgs(ADDRESS, output="x").data


def test_plan_reads_the_vocabulary_of_tokens_at_an_address(bucket: Any, small_tokenizer: Tokenizer) -> None:
    from llama_jax.config import Config

    assert vocabulary(Config(data=DataArgs(ADDRESS))).value == small_tokenizer.vocab_size


def test_the_small_files_of_an_address_are_checked(bucket: Any, cache: Path) -> None:
    assert find_prepared("memory://bucket") is None and find_prepared("memory://bucket/tok*") is None
    with pytest.raises(UserError, match=r"expected a folder of prepared tokens with manifest\.json, found none"):
        open_tokens("memory://elsewhere")
    for name in ("tokenizer.model", "checksums.bin", "documents.bin"):
        content = bucket.cat_file(f"/bucket/tokens/{name}")
        for other, found in ((content[:-1] + b"?", "another"), (None, "none")):
            shutil.rmtree(cache, ignore_errors=True)
            bucket.rm(f"/bucket/tokens/{name}")
            if other is not None:
                bucket.pipe(f"/bucket/tokens/{name}", other)
            with pytest.raises(UserError, match=rf"{ADDRESS}/{name}: expected the file that belongs .*, found {found}"):
                open_tokens(ADDRESS)
            bucket.pipe(f"/bucket/tokens/{name}", content)
    bucket.pipe("/bucket/tokens/manifest.json", b'{"text_sha256": 1}')
    with pytest.raises(UserError, match=rf"{ADDRESS}/manifest\.json: expected a manifest .* damaged"):
        open_tokens(ADDRESS)


def shard_of(bucket: Any, number: int = 3) -> str:
    return f"/bucket/tokens/train-{number:05d}.bin"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_shard_that_is_damaged_in_the_bucket_is_named_and_never_read(
    folder: Path, bucket: Any, damage: str, when: str, forgetful: None
) -> None:
    name = shard_of(bucket)
    content = bucket.cat_file(name)
    tokens = open_tokens(ADDRESS, 0.0) if when == "after" else None
    bucket.rm(name)
    if damage == "flipped":
        bucket.pipe(name, content[:70_000] + bytes([content[70_000] ^ 1]) + content[70_001:])
    elif damage == "cut":
        bucket.pipe(name, content[:70_000])
    words = {
        "flipped": "expected the tokens that were written, found bytes 65,536 to .* changed since",
        "cut": rf"expected a file of {len(content):,} bytes, found 70,000",
        "missing": rf"expected a file of {len(content):,} bytes, found none",
    }[damage]
    on_disk = open_tokens(folder)
    with pytest.raises(UserError, match=rf"{ADDRESS}/train-00003\.bin: {words}; upload it again"):
        tokens = tokens or open_tokens(ADDRESS, 0.0)
        for found, wanted in zip(*(train_batches(t.train, 4, 300, 0, 0, 500) for t in (tokens, on_disk)), strict=True):
            assert np.array_equal(found.inputs, wanted.inputs)


def test_a_damaged_cache_is_mended(folder: Path, bucket: Any, cache: Path) -> None:
    wanted = np.asarray(open_tokens(folder).train)
    assert np.array_equal(open_tokens(ADDRESS).train, wanted)
    kept = sorted(cache.glob(f"*/train*{KEPT}"))
    for path in kept:
        with open(path, "r+b") as file:
            file.seek(random.Random(str(path.name)).randrange(path.stat().st_size))
            file.write(b"\xff\x00\xff")
    os.truncate(kept[0], 1000)
    kept[1].unlink()
    for _ in range(2):
        assert np.array_equal(open_tokens(ADDRESS).train, wanted)
    with counted(bucket) as asked:
        assert np.array_equal(open_tokens(ADDRESS).train, wanted)
    assert all(start is None for _, start in asked)


class Away:
    """A bucket that fails a number of times, from some moment on."""

    def __init__(self, patch: pytest.MonkeyPatch, failures: int):
        self.failures, self.waits = failures, list[float]()
        self._original = MemoryFileSystem.cat_file
        patch.setattr(places_module.time, "sleep", self.waits.append)
        patch.setattr(MemoryFileSystem, "cat_file", lambda *a, **o: self.cat_file(*a, **o))

    def cat_file(self, *args: Any, **options: Any) -> bytes:
        if self.failures and options.get("start") is not None:
            self.failures -= 1
            raise ConnectionError("the server went away")
        return self._original(*args, **options)


@pytest.mark.parametrize("failures", [4, 10**9])
def test_a_bucket_that_goes_away_is_asked_again_for_a_minute_and_then_named(
    folder: Path,
    bucket: Any,
    forgetful: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: int,
) -> None:
    wanted = batches_of(open_tokens(folder))
    tokens = open_tokens(ADDRESS, 0.0)
    away = Away(monkeypatch, failures)
    if failures == 4:
        assert equal(batches_of(tokens), wanted)
        assert "the server went away; trying again in 1 s" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=rf"{ADDRESS}/.*\.bin: expected a file .* found: the server went away"):
            batches_of(tokens)
        assert sum(away.waits) >= 60
        # Many wait; it is told for all of them.
        assert capsys.readouterr().out.count("trying again in 32 s") < 4


def test_a_run_whose_bucket_does_not_come_back_is_saved_first(
    bucket: Any, tmp_path: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_jax.checkpoint import steps_of
    from llama_jax.config import Config, ModelArgs, TrainArgs
    from llama_jax.training import loop

    model = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=64)
    train = TrainArgs(max_steps=200, batch_size=4, log_interval=50, eval_interval=200, save_dir=str(tmp_path / "run"))
    config = Config(model, DataArgs(ADDRESS, cache_gb=0.0), train)
    away = Away(monkeypatch, 0)
    dispatched = loop.Clock.dispatched

    def note(self: Any, step: int, loss: Any) -> None:
        away.failures = 10**9 if step == 5 else away.failures
        dispatched(self, step, loss)

    monkeypatch.setattr(loop.Clock, "dispatched", note)
    with pytest.raises(UserError, match="the server went away"):
        loop.train(config)
    (step,) = steps_of(tmp_path / "run")
    assert 5 <= step < 200


def test_a_full_disk_is_told_once_and_the_run_goes_on(
    folder: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = batches_of(open_tokens(folder))
    writes = itertools.count()
    original = os.pwrite

    def pwrite(file: int, raw: bytes, at: int) -> int:
        if next(writes) < 2:
            return original(file, raw[: len(raw) // 2], at)  # a part is written, and the rest at the next call
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "pwrite", pwrite)
    assert equal(batches_of(open_tokens(ADDRESS)), wanted)
    assert capsys.readouterr().out.count("No space left on device; no more tokens are kept there") == 1
    monkeypatch.undo()


def test_a_disk_that_is_nearly_full_is_left_alone(
    folder: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache_module, "FREE_SHARE", 1.0)
    assert equal(batches_of(open_tokens(ADDRESS)), batches_of(open_tokens(folder)))
    assert capsys.readouterr().out.count("the disk has only") == 1


def test_a_cache_that_cannot_be_written_is_named(bucket: Any, cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match="expected a folder that can be written, to keep tokens in, found"):
        open_tokens(ADDRESS)


def filled(key: str, used: int, limit: int = 10**9) -> TokenCache:
    cache = TokenCache(key, limit)
    cache.make_room(used, 0)
    cache.keep("train.bin", 0, b"x" * used)
    return cache


def let_go(cache: TokenCache) -> None:
    fcntl.flock(cache._in_use, fcntl.LOCK_UN)


def test_sets_that_nobody_uses_make_room_those_not_used_for_longest_first(cache: Path) -> None:
    old, older, used = filled("old", 400_000), filled("older", 400_000), filled("used", 400_000)
    os.utime(old.folder / IN_USE, (2, 2))
    os.utime(older.folder / IN_USE, (1, 1))
    os.utime(used.folder / IN_USE, (0, 0))
    let_go(old)
    let_go(older)
    new = filled("new", 400_000, 1_300_000)
    assert new.fits and (new.used, older.used) == (401_408, 0) and old.used == used.used == 401_408
    assert used.read("train.bin", 0, 5) == b"xxxxx"
    larger = TokenCache("larger", 1_000_000)
    larger.make_room(900_000, 0)
    assert not larger.fits and old.used == 0 and used.used and larger.removed == 401_408
    # What is left of the limit is used, and no more.
    for start in range(0, 900_000, 100_000):
        larger.keep("train.bin", start, b"x" * 100_000)
    assert larger.used + used.used + new.used <= 1_000_000 and larger.used > 50_000


def test_a_set_that_is_removed_while_it_is_read_is_read_on(folder: Path, bucket: Any, cache: Path) -> None:
    wanted = batches_of(open_tokens(folder))
    tokens = open_tokens(ADDRESS)
    batches = train_batches(tokens.train, 4, 300, 7, 0, STEPS)
    first = [next(batches).inputs for _ in range(3)]
    for path in cache.glob(f"*/*{KEPT}"):
        path.unlink()
    assert equal(first + [batch.inputs for batch in batches], wanted[:STEPS])


def test_held_out_tokens_stay_in_a_cache_that_is_too_small(bucket: Any, cache: Path, forgetful: None) -> None:
    held_out = open_tokens(ADDRESS, 0.0).eval.size * 2
    tokens = open_tokens(ADDRESS, 4 * held_out / 1e9)
    _ = np.asarray(tokens.train)
    _ = np.asarray(tokens.eval)
    again = open_tokens(ADDRESS, 4 * held_out / 1e9)
    with counted(bucket) as asked:
        _ = np.asarray(again.eval)
        assert not asked
        _ = np.asarray(again.train)
    assert asked
    # A smaller limit takes effect on what is there.
    open_tokens(ADDRESS, 1e-5)
    assert sum(path.stat().st_blocks * 512 for path in cache.glob(f"*/train*{KEPT}")) <= 10_000


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server's handler that sends parts of files."""

    sends_parts = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not path.is_file():
            self.send_error(500 if "a.txt" in self.path else 404)
            return
        content = path.read_bytes()
        if asked and self.sends_parts:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked and self.sends_parts else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Whole(Ranges):
    """A web server's handler that sends files whole."""

    sends_parts = False


@contextlib.contextmanager
def served(folder: Path, handler: Callable[..., Any]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    ) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def test_tokens_on_a_web_server_are_read_if_it_sends_parts_of_files(folder: Path) -> None:
    pytest.importorskip("aiohttp")
    wanted = batches_of(open_tokens(folder))
    with served(folder.parent, Ranges) as address:
        assert find_prepared(f"{address}/a.txt") is None
        assert equal(batches_of(open_tokens(f"{address}/tokens/")), wanted)
        assert equal(batches_of(open_tokens(f"{address}/tokens", 0.0)), wanted)
    with (
        served(folder.parent, Whole) as address,
        pytest.raises(UserError, match="expected a server that sends parts of files, found one that sends them whole"),
    ):
        batches_of(open_tokens(f"{address}/tokens", 0.0))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/tokens: expected a file that can be read"):
        open_tokens("http://127.0.0.1:9/tokens")


def test_a_file_address_is_a_bucket_as_well(folder: Path) -> None:
    assert equal(batches_of(open_tokens(f"file://{folder}")), batches_of(open_tokens(folder)))
    assert len(open_tokens(Path(f"file://{folder}")).train)


def test_two_processes_on_one_cache_read_a_bucket_of_googles(folder: Path, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "read.py"
    script.write_text(
        "import sys, hashlib\n"
        "from llama_jax.data import open_tokens\n"
        "from llama_jax.data.batches import train_batches\n"
        "sha = hashlib.sha256()\n"
        "for batch in train_batches(open_tokens(sys.argv[1]).train, 4, 300, 7, 0, 60): sha.update(batch.inputs.tobytes())\n"
        "print(sha.hexdigest())\n"
    )
    found = []
    with google.running() as stored:
        for path in folder.iterdir():
            if path.is_file():
                stored.write(f"tokens/{path.name}", path.read_bytes(), {})
        environment = stored.environment | {"XDG_CACHE_HOME": str(cache.parent.parent)}

        def read(address: str) -> None:
            done = forked.run([str(script), address], tmp_path, environment=environment)
            assert done.returncode == 0, done.stderr
            found.append(done.stdout.split()[-1])

        threads = [threading.Thread(target=read, args=(a,)) for a in ["gs://bucket/tokens"] * 2 + [str(folder)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3 and len(set(found)) == 1
        stored.objects.pop("tokens/train-00002.bin")
        missing = forked.run([str(script), "gs://bucket/tokens"], tmp_path, environment=environment)
    assert "gs://bucket/tokens/train-00002.bin: expected a file of" in missing.stderr
