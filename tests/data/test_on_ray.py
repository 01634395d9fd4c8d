"""prepare --ray: the shards of one prepare, whatever becomes of the nodes. Clusters of two nodes on this machine are slow tests."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from llama_jax.config import DataArgs
from llama_jax.data import find_text, on_node, on_ray, shards
from llama_jax.data.__main__ import main
from llama_jax.data.encode import Job, read_result
from llama_jax.data.shards import encode_tasks, job_of, prepare
from llama_jax.data.workers import Said
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.commands import ROOT
from tests.processes import free_address

TASK_BYTES = 20_000
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="needs ray, which the test extra brings where there are wheels of it",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """A text in some 100 tasks, as plain text and as JSON lines, and the tokens of the first, made by one process."""
    folder = tmp_path_factory.mktemp("text")
    documents = [f"document {i}: the fox went to the river {i % 7} times\n" * (1 + i % 9) for i in range(8000)]
    (folder / "a.txt").write_text("\n\n".join(documents))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    with small_tasks():
        prepare(find_text(text_of(folder), folder).corpus, small_tokenizer, folder / "whole", source="a.txt")
    return folder


@contextlib.contextmanager
def small_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "TASK_BYTES", TASK_BYTES)
        yield


def text_of(folder: Path) -> DataArgs:
    return DataArgs(str(folder / "a.txt"), separator=r"\n\n")


@pytest.fixture
def job(folder: Path, tmp_path: Path, small_tokenizer: Tokenizer) -> Job:
    """A job of three tasks that nobody has begun."""
    path = tmp_path / "short.txt"
    path.write_text((folder / "a.txt").read_text()[: 3 * TASK_BYTES])
    with small_tasks():
        corpus = find_text(DataArgs(str(path), separator=r"\n\n"), tmp_path / "out").corpus
        job = job_of(corpus, small_tokenizer, tmp_path / "out", corpus.digest(), None, {"source": "short.txt"})
    assert len(job.tasks) == 3
    return job


# Without a cluster.


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ray", "auto", "--part", "1/2"], "--ray: expected none beside --part, found auto"),
        (["--ray", "auto", "--filepath", "-"], "--filepath: expected a text that all nodes see beside --ray, found -"),
        (["--ray", "here"], "--ray: expected HOST:PORT of a cluster .*, or auto, found 'here'"),
        (["--ray", "ray://host:10001"], "--ray: expected HOST:PORT of a cluster .*, or auto, found 'ray://host:10001'"),
        (["--ray", "127.0.0.1:99999"], "--ray: expected HOST:PORT"),
        (["--ray", "nobody"], "--ray: expected a Ray cluster at 127.0.0.1:.*, found: Connection refused"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_done_on_a_cluster_is_refused(folder, tmp_path, small_tokenizer, monkeypatch, more, words):
    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: object())
    more = [free_address() if word == "nobody" else word for word in more]
    flags = ["--filepath", str(folder / "a.txt"), "--tokenizer-model-path", str(small_tokenizer.model_path)]
    with pytest.raises(UserError, match=f"^{words}[^\n]*$"):
        main(["prepare", *flags, "--output", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_a_missing_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--ray: expected ray, .* found it not installed; pip install .*\[ray\]"):
        on_ray.connected("auto").__enter__()


class Lost(Exception):
    """The error of Ray for a lost process."""


class LocalLost(Lost):
    """The error of Ray for tasks whose driver has lost its node."""


class FakeRay:
    """What the driver needs of Ray. A task's result is what ``ends`` returns of it, or raises. None: tasks never end."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=KeyError, LocalRayletDiedError=LocalLost)

    def __init__(self, ends: Callable[[int], str] | None, nodes: list[list[str]]):
        self._ends, self._nodes = ends, nodes
        self.begun, self.cancelled = list[int](), list[Any]()

    def remote(self, **options: Any) -> Any:
        assert options == {"num_cpus": 1, "max_retries": 0}

        def begin(_: bytes, version: str, task: int) -> Any:
            self.begun.append(task)
            return object(), task

        return lambda function: SimpleNamespace(remote=begin)

    def put(self, content: bytes) -> bytes:
        return content

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = refs[: self._ends is not None]
        return ready, refs[len(ready) :]

    def get(self, ref: Any) -> str:
        assert self._ends is not None
        return self._ends(ref[1])

    def cancel(self, ref: Any, force: bool) -> None:
        self.cancelled.append(ref[1])

    def nodes(self) -> list[dict[str, Any]]:
        names = self._nodes.pop(0) if len(self._nodes) > 1 else self._nodes[0]
        table = {"Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerHostname": "host"}
        return [table | {"NodeID": name} for name in names] + [table | {"NodeID": "gone", "Alive": False}]


def driven(ray: FakeRay, count: int = 3, stopped: threading.Event | None = None) -> list[tuple[str, Any]]:
    said: list[tuple[str, Any]] = []
    on_ray.drive(ray, "1", range(count), b"", lambda *words: said.append(words), stopped or threading.Event())
    return said


def test_a_lost_task_is_begun_again_and_told():
    losses = [1, 1, 0]

    def ends(task: int) -> str:
        if task in losses:
            losses.remove(task)
            raise Lost("the node died")
        return ""

    ray = FakeRay(ends, [["a"]])
    said = driven(ray)
    assert sorted(value for word, value in said if word == "done") == [0, 1, 2]
    told = [value for word, value in said if word == "told"]
    assert told == [
        f"lost the process or node that did shard {task} (Lost: the node died); done again: 1" for task in (0, 1, 1)
    ]
    assert sorted(ray.begun) == [0, 0, 1, 1, 1, 2] and not ray.cancelled


def test_a_task_that_no_node_survives_ends_the_command():
    def ends(task: int) -> str:
        if task == 1:
            raise Lost("killed")
        return ""

    ray = FakeRay(ends, [["a"]])
    with pytest.raises(
        UserError,
        match=r"^--ray: expected a process that encodes shard 1, found that 10 were lost with it \(Lost: killed\)",
    ):
        driven(ray)
    assert ray.begun.count(1) == 10


def test_an_error_in_a_task_is_the_commands_and_cancels_the_others():
    ray = FakeRay(lambda task: "a.jsonl: line 3: expected JSON" if task == 0 else "", [["a"]])
    with pytest.raises(UserError, match=r"^a\.jsonl: line 3: expected JSON$"):
        driven(ray)
    assert ray.cancelled == [1, 2]


def test_a_driver_that_has_lost_its_node_ends():
    def ends(task: int) -> str:
        raise LocalLost("the local node died")

    ray = FakeRay(ends, [["a"]])
    assert driven(ray) == [("lost", None)] and ray.begun == [0, 1, 2]


def test_a_stop_cancels_the_tasks():
    stopped = threading.Event()
    ray = FakeRay(None, [["a"]])
    threading.Timer(0.05, stopped.set).start()
    driven(ray, stopped=stopped)
    assert ray.cancelled == [0, 1, 2]


def test_nodes_that_come_and_go_are_told_and_none_for_a_while_ends_the_command(monkeypatch):
    monkeypatch.setattr(on_ray, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(on_ray, "LONELY_SECONDS", 0.05)
    said: list[tuple[str, Any]] = []
    ray = FakeRay(None, [["a", "b"], ["a"], ["a", "c"], []])
    with pytest.raises(
        UserError, match=r"^--ray: expected a node with a CPU, found none for .*, what is done is kept$"
    ):
        on_ray.drive(ray, "1", [0], b"", lambda *words: said.append(words), threading.Event())
    assert [value.partition(";")[0] for _, value in said] == [
        "node host (b) is lost", "node host (c) has joined, 2 are there", "node host (a) is lost", "node host (c) is lost",
        "no node with a CPU is there",
    ]  # fmt: skip


def test_a_node_encodes_what_it_shares_and_names_what_it_does_not(job, tmp_path, monkeypatch, llama2_tokenizer):
    text = tmp_path / "short.txt"
    with on_ray._marked(job, [0]) as wanted:
        monkeypatch.chdir("/")
        assert on_node.encode_here(pickle.dumps(wanted), 0) == "" and read_result(job, 0) is not None
        relative = tuple((dataclasses.replace(place, name="short.txt"), mark) for place, mark in wanted.files)
        here = dataclasses.replace(wanted, files=relative, here=str(tmp_path))
        assert on_node.encode_here(pickle.dumps(here), 1) == "" and Path.cwd() == tmp_path

        def told(path: Path, found: str) -> None:
            line = on_node.encode_here(pickle.dumps(wanted), 2)
            assert f"{path}: expected to be on a disk that all nodes share, found {found}" in line and "\n" not in line

        os.utime(text, ns=(0, 0))
        told(text, "a file of another size or time on node")
        text.unlink()
        told(text, "no such file on node")
        other = dataclasses.replace(job, tokenizer=Path(llama2_tokenizer.model_path))
        wanted = dataclasses.replace(wanted, job=other)
        told(other.tokenizer, "another tokenizer on node")
        other = dataclasses.replace(job, tokenizer=tmp_path / "none.model")
        wanted = dataclasses.replace(wanted, job=other)
        told(other.tokenizer, "No such file or directory on node")
    told(job.folder.parent, "that this is not so on node")
    assert not any(job.folder.glob("shared-*"))


def test_a_node_with_another_state_of_the_package_or_none_says_so(tmp_path):
    pickles = pytest.importorskip("ray.cloudpickle", reason="needs ray, which the test extra brings")
    encode = on_node.encode_on_node()
    assert "expected llama-jax 0.0.1 (code 1) on every node, found on node" in encode(b"", "0.0.1 (code 1)", 0)
    other = f"{on_node.version().partition(' ')[0]} (code 0)"
    assert f": {on_node.version()}; install the same on all nodes" in encode(b"", other, 0)
    (tmp_path / "sent").write_bytes(pickles.dumps(encode))
    program = (
        "import pickle, sys; sys.modules['llama_jax'] = None\n"
        "print(pickle.load(open('sent', 'rb'))(b'', '0.1 (code 1)', 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "expected llama-jax 0.1 (code 1) on every node, found on node" in done.stdout
    assert "none that can be imported (" in done.stdout and done.stdout.count("\n") == 1


class FakeDriver:
    """A driver that does as many tasks as it is told to, and then ends."""

    def __init__(self, said: "queue.SimpleQueue[Said]", tasks: int):
        self._said, self._tasks = said, tasks
        self.say("connected", "2 nodes")

    def say(self, word: str, value: Any) -> None:
        self._said.put(Said(self, word, value))  # type: ignore[arg-type]

    def send(self, content: bytes) -> None:
        _, tasks, wanted = pickle.loads(content)
        for task in tasks[: self._tasks]:
            assert on_node.encode_here(wanted, task) == ""
            self.say("done", task)
        self.say("ended", None)


def test_a_lost_driver_is_followed_by_another_until_that_is_in_vain(job, small_tokenizer, monkeypatch, capsys):
    abilities = [1, 0, 2]

    @contextlib.contextmanager
    def process(module: str, said: "queue.SimpleQueue[Said]", *_: Any, **__: Any) -> Iterator[FakeDriver]:
        yield FakeDriver(said, abilities.pop(0) if abilities else 0)

    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(on_ray, "running_process", process)
    with on_ray.connected("auto") as run:
        encode_tasks(job, range(3), small_tokenizer, 1, run)
    assert all(read_result(job, task) for task in range(3))
    assert capsys.readouterr().out.count("ray: lost the cluster at auto; connecting again") == 2
    (job.folder / "000002.json").unlink()
    with (
        pytest.raises(UserError, match=r"to stay, found it lost again and again; .*, what is done is kept"),
        on_ray.connected("auto") as run,
    ):
        encode_tasks(job, range(3), small_tokenizer, 1, run)
    assert "2 of 3 shards are there from an earlier start" in capsys.readouterr().out


# On clusters.


class Cluster:
    """A cluster of nodes on this machine, with a CPU each. A node is a session of processes."""

    FLAGS = (
        "--num-cpus=1",
        "--object-store-memory=80000000",
        "--disable-usage-stats",
        "--min-worker-port=0",
        "--max-worker-port=0",
    )
    # A lost node is known to be lost after two seconds.
    ENVIRONMENT: ClassVar = {
        f"RAY_health_check_{name}": value
        for name, value in
        {"initial_delay_ms": "0", "period_ms": "500", "timeout_ms": "500", "failure_threshold": "3"}.items()
    }  # fmt: skip

    def __init__(self, folder: str):
        self.address = free_address()
        self.nodes: list[subprocess.Popen[str]] = []
        ports = [
            f"--{name}={free_address().rpartition(':')[2]}" for name in ("dashboard-port", "ray-client-server-port")
        ]
        host, _, port = self.address.rpartition(":")
        self.start(
            "--head",
            f"--port={port}",
            f"--node-ip-address={host}",
            f"--temp-dir={folder}",
            "--include-dashboard=false",
            *ports,
        )

    def start(self, *flags: str) -> None:
        """Start one more node, and wait for it."""
        flags = flags or (f"--address={self.address}", "--node-ip-address=127.0.0.1")
        agent = f"--dashboard-agent-listen-port={free_address().rpartition(':')[2]}"
        node = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *self.FLAGS, agent, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | self.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.nodes.append(node)
        assert node.stdout is not None
        said = []
        for line in node.stdout:
            said.append(line)
            if "will now block forever" in line:
                threading.Thread(target=node.stdout.read, daemon=True).start()
                return
        raise AssertionError("".join(said))

    def kill(self, node: subprocess.Popen[str]) -> None:
        """Kill all processes of a node, at once."""
        while found := processes_of(node.pid):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.poll()
            time.sleep(0.01)
        self.nodes.remove(node)

    def encoding(self, *nodes: "subprocess.Popen[str]") -> list[int]:
        """Processes of the nodes, or of all nodes, that encode."""
        return [pid for node in nodes or self.nodes for pid in processes_of(node.pid) if encodes(pid)]

    def stop_in_a_task(self, node: "subprocess.Popen[str]") -> bool:
        """Stop a process of the node in the middle of a task, which then cannot end before the node does."""
        for pid in self.encoding(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                if encodes(pid):
                    return True
                os.kill(pid, signal.SIGCONT)
        return False


def encodes(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::encode")
    return False


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes. Its folder has a short name, for the names of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            for node in list(cluster.nodes):
                cluster.kill(node)


def command(folder: Path, output: Path, tokenizer: Tokenizer, address: str, *more: str) -> "subprocess.Popen[str]":
    program = (
        f"from llama_jax.data import on_ray, shards; shards.TASK_BYTES = {TASK_BYTES}; on_ray.RECONNECT_SECONDS = 3; "
        "from llama_jax.data.__main__ import main; from llama_jax.errors import run_command; run_command(main)"
    )
    flags = ["--filepath", "a.txt", "--separator", r"\n\n", "--output", str(output), "--ray", address, *more]
    return subprocess.Popen(
        [sys.executable, "-c", program, "prepare", "--tokenizer-model-path", str(tokenizer.model_path), *flags],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
    )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def done_in(output: Path) -> int:
    return len(list(output.glob("unfinished-*/[0-9]*.json")))


def check_same(output: Path, folder: Path) -> None:
    found, wanted = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (output, folder / "whole"))
    del found["tokenizer.model"]
    assert found == wanted and len(found) > 50


@needs_ray
@pytest.mark.slow
def test_two_nodes_make_the_shards_of_one_prepare(folder, tmp_path, small_tokenizer, cluster):
    process = command(folder, tmp_path / "out", small_tokenizer, cluster.address, "--workers", "3")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, ""), err
    assert "a shard at a time on each CPU of the cluster: 2 nodes, 2 CPUs" in out and "--workers is not used" in out
    check_same(tmp_path / "out", folder)


@needs_ray
@pytest.mark.slow
def test_a_node_that_is_killed_at_random_moments_leaves_no_trace_in_the_shards(
    folder, tmp_path, small_tokenizer, cluster
):
    rng = random.Random(0)
    tasks = sum(path.name.startswith("train-") for path in (folder / "whole").iterdir())
    for moment in range(5):
        output, goal = tmp_path / str(moment), rng.randrange(0, tasks * 3 // 4)
        process = command(folder, output, small_tokenizer, cluster.address)
        wait_for(lambda output=output, goal=goal: done_in(output) >= goal and cluster.stop_in_a_task(cluster.nodes[1]))
        cluster.kill(cluster.nodes[1])
        out, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, ""), err
        assert re.search(r"ray: (lost the process or node that did shard|node .* is lost;)", out), out
        check_same(output, folder)
        cluster.start()
        shutil.rmtree(output)


@needs_ray
@pytest.mark.slow
def test_an_error_in_a_record_is_the_one_line_of_the_command(folder, tmp_path, small_tokenizer, cluster):
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[400] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    more = ["--filepath", "a.jsonl", "--separator", ""]
    process = command(tmp_path, tmp_path / "out", small_tokenizer, cluster.address, *more)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and err.startswith("error: a.jsonl: line 401: expected JSON"), err
    assert err.count("\n") == 1
    wait_for(lambda: not cluster.encoding(), 10)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_tasks_end_with_the_command_which_then_goes_on(folder, tmp_path, small_tokenizer, cluster, end):
    process = command(folder, tmp_path / "out", small_tokenizer, cluster.address)
    wait_for(lambda: done_in(tmp_path / "out") > 3)
    process.send_signal(end)
    _, err = process.communicate(timeout=30)
    if end == signal.SIGINT:
        assert (process.returncode, err) == (130, "stopped by Ctrl-C\n")
    wait_for(lambda: not cluster.encoding(), 15)
    process = command(folder, tmp_path / "out", small_tokenizer, cluster.address, "--ray", "auto")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "") and "shards are there from an earlier start" in out
    check_same(tmp_path / "out", folder)


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_lost_ends_the_command_and_what_is_done_is_kept(folder, tmp_path, small_tokenizer):
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        lost = Cluster(place)
        process = command(folder, tmp_path / "out", small_tokenizer, lost.address)
        try:
            wait_for(lambda: done_in(tmp_path / "out") > 3)
        finally:
            lost.kill(lost.nodes[0])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.startswith("error: --ray: expected a Ray cluster at 127.0.0.1:"), err
    assert err.count("\n") == 1 and err.endswith("then repeat the command, what is done is kept\n")
    assert done_in(tmp_path / "out") > 3
