"""A corpus and its tokens in s3://, of a server that answers as Amazon's does (moto), through the commands and a run."""

import contextlib
import json
import logging
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from llama_jax.data import open_tokens
from llama_jax.data.batches import train_batches
from llama_jax.tokenizer import Tokenizer
from tests import inside

pytest.importorskip("s3fs", reason="s3fs, which opens s3://, is not installed: the extra s3")
moto = pytest.importorskip(
    "moto.server", reason="moto, which answers in Amazon's place, is not installed: the extra test"
)

RUN = ["--model.dim", "16", "--model.n-layers", "1", "--model.n-heads", "2", "--model.max-seq-len", "32", "--train.batch-size", "4",
       "--train.eval-iters", "2", "--train.min-lr-ratio", "1", "--train.warmup-steps", "1", "--train.save-interval", "4", "--train.log-interval", "1", "--data.cache-gb", "0"]  # fmt: skip


class Gate:
    """A port before the server's, which can be shut: whoever connects is refused, as by a bucket that is away."""

    def __init__(self, server: tuple[str, int]):
        self._server = server
        self._listening: socket.socket | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._open_connections: list[socket.socket] = []

    def open(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self._listening = listening

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    ends = listening.accept()[0], socket.create_connection(self._server)
                    self._open_connections += ends
                    for source, target in (ends, ends[::-1]):
                        threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def shut(self) -> None:
        assert self._listening is not None
        for each in (self._listening, *self._open_connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open_connections.clear()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    """The way to s3://bucket, which has a corpus of JSON lines in two files."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    gate = Gate(server.get_host_and_port())
    gate.open()
    rng = random.Random(0)
    words = ["fox", "owl", "river", "boat", "tree", "sea", "ducks"]
    texts = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 60)))}) for _ in range(2000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "who")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        for i in range(2):
            system.pipe(f"bucket/corpus/{i}.jsonl", "".join(f"{text}\n" for text in texts[i::2]).encode())
        yield gate
        system.clear_instance_cache()  # the next one may have another endpoint
    gate.shut()
    server.stop()


def done(argv: list[str], folder: Path, status: int = 0) -> str:
    result = inside.run(argv, folder)
    assert result.returncode == status, result.stderr + result.stdout
    return result.stdout + result.stderr


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]


@pytest.fixture
def tokens(gate: Gate, tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus at s3://bucket/corpus, as tokens on the disk and at s3://bucket/tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare = ["-m", "llama_jax.data", "prepare", "--filepath", "s3://bucket/corpus/", "--output", "tokens"]
    done([*prepare, "--tokenizer-model-path", str(small_tokenizer.model_path)], tmp_path)
    fsspec.filesystem("s3").put(f"{tmp_path}/tokens/", "bucket/tokens/", recursive=True)
    return tmp_path / "tokens"


def test_prepare_inspect_and_a_run_that_is_resumed_take_a_bucket_of_amazons_as_a_folder(tokens: Path) -> None:
    folder = tokens.parent
    reports = []
    for name in ("s3://bucket/tokens", "tokens"):
        report = json.loads(
            inside.run(["-m", "llama_jax.data", "inspect", "--json", "--filepath", name], folder).stdout
        )
        assert report.pop("source") == name and name in report.pop("notes")[0]
        reports.append(report)
    assert reports[0]["documents"] == 2000 and reports[0] == reports[1]
    run = ["train.py", *RUN, "--data.filepath", "s3://bucket/tokens", "--train.max-steps"]
    for steps in ("4", "8"):
        done([*run, steps, "--train.save-dir", "resumed"], folder)
    done(["train.py", *RUN, "--data.filepath", "tokens", "--train.max-steps", "8", "--train.save-dir", "near"], folder)
    assert [step for step, _ in losses(folder / "near")] == list(range(1, 9))
    assert losses(folder / "resumed") == losses(folder / "near")
    refused = done(
        ["-m", "llama_jax.data", "prepare", "--filepath", "s3://bucket/corpus/", "--output", "s3://bucket/x"], folder, 2
    )
    assert "aws s3 cp --recursive" in refused
    assert "s3://bucket/none" in done(["-m", "llama_jax.data", "inspect", "--filepath", "s3://bucket/none"], folder, 2)


def test_a_bucket_of_amazons_that_comes_back_is_waited_for_and_the_batches_are_the_same(
    tokens: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def tell(name: str, reason: str, wait: int) -> None:
        told.append(f"{name}: {reason}")
        if len(told) == 1:
            gate.open()

    monkeypatch.setattr("llama_jax.data.remote.RECENT", 0)
    monkeypatch.setattr("llama_jax.data.remote.tell_waiting", tell)
    far, near = open_tokens("s3://bucket/tokens", 0.0), open_tokens(tokens)
    gate.shut()
    streams = [train_batches(each.train, 4, 32, 7, 0, 20) for each in (far, near)]
    for left, right in zip(*streams, strict=True):
        assert np.array_equal(left.inputs, right.inputs)
    assert "s3://bucket/tokens/train.bin: Could not connect" in told[0]
