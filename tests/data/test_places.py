"""Corpora behind addresses: the same documents as on disk, without a copy; what fails is tried again, and then named."""

import functools
import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llama_jax.config import DataArgs
from llama_jax.data import Data, load_data, open_tokens
from llama_jax.data import places as places_module
from llama_jax.data.corpus import Records
from llama_jax.data.places import Stored
from llama_jax.data.sources import find_files
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests import bucket as google
from tests import forked

TEXTS = [f"The fox {i} went to the river.\n" for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A file system in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def load(folder: Path, tokenizer: Tokenizer, filepath: str, begun: bool = False, **options) -> Data:
    args = DataArgs(filepath, tokenizer_model_path=str(tokenizer.model_path), **options)
    return load_data(args, folder / "run" / "tokens", folder / "run" / "tokenizer.model", begun=begun)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.txt", "a.txt.gz"])
def test_a_file_behind_an_address_gives_the_tokens_of_the_one_on_disk(
    tmp_path: Path, small_tokenizer: Tokenizer, bucket: Any, name: str
) -> None:
    if name == "a.parquet":
        pytest.importorskip("pandas").DataFrame({"text": TEXTS}).to_parquet(tmp_path / name, row_group_size=40)
    else:
        content = LINES if "jsonl" in name else "".join(TEXTS).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    bucket.pipe(f"/corpus/{name}", (tmp_path / name).read_bytes())
    on_disk = load(tmp_path / "1", small_tokenizer, str(tmp_path / name))
    for address in (f"memory://corpus/{name}", "memory://corpus", "memory://corpus/a.*"):
        data = load(tmp_path / "2", small_tokenizer, address)
        assert np.array_equal(data.tokens.train, on_disk.tokens.train)
        assert np.array_equal(data.tokens.eval, on_disk.tokens.eval)
    assert load(tmp_path / "2", small_tokenizer, address, begun=True).tokens.manifest == data.tokens.manifest
    bucket.pipe(f"/corpus/{name}", (tmp_path / name).read_bytes().replace(b"river", b"shore")[:-1])
    with pytest.raises(UserError):
        load(tmp_path / "2", small_tokenizer, address, begun=True)


def test_a_folder_behind_an_address_is_searched_as_one_on_disk(bucket: Any) -> None:
    for name in ("a/train-0.jsonl", "a/test-0.jsonl", "a/.hidden.jsonl", "a/README.md", "a/deep/train-1.jsonl"):
        bucket.pipe(f"/{name}", LINES)
    bucket.pipe("/a/README.md", b"# Title\n")
    files, notes = find_files("memory://a")
    assert [file.name.rpartition("/")[2] for file in files] == ["train-1.jsonl", "train-0.jsonl"]
    told = " / ".join(notes)
    assert "1 *.md" in told and "hidden: 1 (.hidden.jsonl)" in told and "the test split: 1 (test-0.jsonl)" in told
    with pytest.raises(UserError, match=r"data\.filepath: expected .*, found nothing at memory://b"):
        find_files("memory://b")
    with pytest.raises(UserError, match=r"nonsense://a: expected an address that can be read"):
        find_files("nonsense://a")


class Flaky:
    """A file whose reads fail now and then."""

    failures = 0

    def __init__(self, file: Any):
        self._file = file

    def read(self, count: int) -> bytes:
        if Flaky.failures and self._file.tell():
            Flaky.failures -= 1
            raise ConnectionError("the server went away")
        return self._file.read(min(count, 1000))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("failures", [3, 10**9])
def test_a_bucket_that_goes_away_is_asked_again_and_then_named(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failures: int
) -> None:
    bucket.pipe("/a.jsonl", LINES)
    files = find_files("memory://a.jsonl").files
    original = Stored._opened
    waits: list[float] = []
    monkeypatch.setattr(Stored, "_opened", lambda self: Flaky(original(self)))
    monkeypatch.setattr(places_module.time, "sleep", waits.append)
    monkeypatch.setattr(Flaky, "failures", failures)
    if failures == 3:
        assert [part.text for part in Records(files, 1.0).parts("train")] == TEXTS
        assert capsys.readouterr().out.count("the server went away; trying again") == 3
    else:
        with pytest.raises(
            UserError, match=r"memory:///a\.jsonl: expected a file that can be read, found: the server went away"
        ):
            list(Records(files, 1.0).parts("train"))
        assert sum(waits) >= 60


class Forward(io.RawIOBase):
    """A file that can only go forward, whose reads fail at the given ones of all that are made."""

    def __init__(self, content: bytes, fails: Iterator[bool]):
        self._content, self._fails = io.BytesIO(content), fails

    def seekable(self) -> bool:
        return False

    def read(self, count: int = -1) -> bytes:
        if next(self._fails, False):
            raise ConnectionError("the server went away")
        return self._content.read(min(count, 100))


def test_a_stream_that_fails_while_it_goes_back_to_its_place_is_never_read_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places_module.time, "sleep", lambda _: None)
    content = bytes(range(256)) * 40
    # The 31st read fails, and then the third of those that go back there, and again.
    fails = iter([*[False] * 30, True, False, False, True, False, True])
    monkeypatch.setattr(Stored, "_opened", lambda self: Forward(content, fails))
    assert io.BufferedReader(Stored("http://x/a"), 1000).read() == content


def test_a_stream_that_is_shorter_when_it_is_opened_again_is_not_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module.time, "sleep", lambda _: None)
    contents, fails = iter([bytes(5000)]), iter([*[False] * 30, True])
    monkeypatch.setattr(Stored, "_opened", lambda self: Forward(next(contents, bytes(1000)), fails))
    with pytest.raises(
        UserError, match=r"http://x/a: expected a file that can be read, found: found its end 2,000 bytes before"
    ):
        io.BufferedReader(Stored("http://x/a"), 1000).read()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server of ``tmp_path``, which does not send parts of files."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_web_address_is_read_as_a_stream(tmp_path: Path, server: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    files = find_files(f"{server}/a.jsonl.gz?download=true").files
    assert [part.text for part in Records(files, 1.0).parts("train")] == TEXTS
    with pytest.raises(UserError, match=r"found nothing at http|expected a file that can be read, found"):
        find_files(f"{server}/missing.jsonl")
    with pytest.raises(UserError, match="expected a file that can be read, found"):
        find_files("http://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize("target", ["corpus/a.jsonl.gz", "corpus", "corpus/*.parquet"])
def test_a_bucket_of_googles_is_prepared_from_without_a_copy(
    tmp_path: Path, small_tokenizer: Tokenizer, target: str
) -> None:
    pd = pytest.importorskip("pandas")
    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "b.parquet", row_group_size=50)
    tokenizer = ["--tokenizer-model-path", str(small_tokenizer.model_path)]
    prepare = ["-m", "llama_jax.data", "prepare", *tokenizer, "--output", "out", "--filepath", f"gs://bucket/{target}"]
    with google.running() as stored:
        stored.write("corpus/a.jsonl.gz", gzip.compress(LINES), {})
        stored.write("corpus/b.parquet", (tmp_path / "b.parquet").read_bytes(), {})
        done = forked.run(prepare, tmp_path, environment=stored.environment)
        assert done.returncode == 0, done.stderr
        again = forked.run(prepare, tmp_path, environment=stored.environment)
        assert "holds these tokens already" in again.stdout
        missing = forked.run([*prepare[:-1], "gs://bucket/missing"], tmp_path, environment=stored.environment)
        assert missing.returncode == 2 and "found nothing at gs://bucket/missing" in missing.stderr
    counts = open_tokens(tmp_path / "out").manifest.documents
    assert sum(counts.values()) == len(TEXTS) * (2 if target == "corpus" else 1)
