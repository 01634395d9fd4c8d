"""Encodes the tasks of a job on a Ray cluster: ``prepare --ray ADDRESS``.

Three kinds of processes take part. The command gives out the work and joins the results. A process that it starts
is the driver of the cluster; Ray may end that one when the cluster is lost, and the command starts another. On the
nodes, Ray's processes encode the tasks into the job's folder, which all nodes share.
"""

import contextlib
import importlib.util
import logging
import os
import pickle
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_jax.cli.progress import duration
from llama_jax.data.encode import Job, read_result
from llama_jax.data.on_node import Wanted, encode_on_node, version
from llama_jax.data.workers import KEPT, Process, Run, Said, answering, running_process
from llama_jax.errors import UserError
from llama_jax.programs import install_command
from llama_jax.tokenizer import Tokenizer

START = "ray start --address=HOST:PORT"
# So many tasks are given to the cluster at a time, so that looking at them stays cheap and the cluster can grow.
AT_ONCE = 1000
# So often a task is begun again whose process, or node, was lost.
ATTEMPTS = 10
# Seconds between looks at the tasks and the nodes, and seconds for which there may be none with a CPU.
LOOK_SECONDS, LONELY_SECONDS = 1.0, 300.0
# Seconds to connect again after the cluster was lost, and seconds until a file of another node must be seen here.
RECONNECT_SECONDS, SEEN_SECONDS = 60.0, 60.0
# Seconds in which the driver cancels its tasks.
CANCEL_SECONDS = 3.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[Run]:
    """Yield a function that encodes tasks of a job on a cluster, as ``run_tasks`` does on this machine.

    Raises UserError if Ray is not installed, or if the address is not that of a cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"--ray: expected ray, which runs the cluster, found it not installed; {install_command('ray')}"
        )
    _check_address(address)
    with contextlib.ExitStack() as stack:
        yield _Cluster(address, stack).run


class _Cluster:
    """A connection to a cluster, made again when it is lost. It ends with ``stack``."""

    def __init__(self, address: str, stack: contextlib.ExitStack):
        self._address = address
        self._connection = stack.enter_context(contextlib.ExitStack())
        self._said = queue.SimpleQueue[Said]()
        self._driver = self._connect()

    def run(self, job: Job, tasks: Sequence[int], _: Tokenizer, __: int, tell: Callable[[int], None]) -> None:
        """Encode tasks. Raises UserError if a task fails, or if there is no cluster to encode them."""
        left, fruitless = list(tasks), 0
        with _marked(job, left) as wanted:
            while left:
                before = len(left)
                self._driver.send(pickle.dumps((version(), left, pickle.dumps(wanted))))
                self._wait(job, left, tell)
                fruitless = fruitless + 1 if len(left) == before else 0
                if left:
                    self._connect_again(fruitless)

    def _wait(self, job: Job, left: list[int], tell: Callable[[int], None]) -> None:
        """Wait until no task is left, or until the driver has ended. Take tasks that are done from ``left``."""
        while left:
            _, word, value = self._said.get()
            if word == "done":
                _see(job, value)
                left.remove(value)
                tell(sum(unit.size for unit in job.tasks[value]))
            elif word == "told":
                print(f"ray: {value}", flush=True)
            elif word == "failed":
                raise UserError(f"{value}")
            else:
                return

    def _connect(self) -> Process:
        """Start a driver, and wait until it is connected. Raises UserError if it cannot connect."""
        self._said = queue.SimpleQueue[Said]()
        # Ray logs to standard error, which is for the one line of an error.
        stderr = None if os.environ.get("LLAMA_JAX_DEBUG") == "1" else subprocess.DEVNULL
        driver = self._connection.enter_context(running_process(__name__, self._said, self._address, stderr=stderr))
        _, word, value = self._said.get()
        if word == "connected":
            print(f"ray: {value}", flush=True)
            return driver
        raise UserError(
            f"--ray: expected a Ray cluster of which this machine is a node at {self._address}, found "
            f"{value if word == 'failed' else driver.reason()}; see ray status, and begin with {START} on this machine"
        )

    def _connect_again(self, fruitless: int) -> None:
        """Start another driver. Raises UserError if there is no cluster for a while, or if that did not help before."""
        self._connection.close()
        until = time.monotonic() + RECONNECT_SECONDS
        print(f"ray: lost the cluster at {self._address}; connecting again", flush=True)
        while True:
            try:
                if fruitless > 3:
                    raise UserError(
                        f"--ray: expected the cluster at {self._address} to stay, found it lost again and again"
                    )
                _check_address(self._address)
                self._driver = self._connect()
                return
            except UserError as error:
                if fruitless > 3 or time.monotonic() > until:
                    raise UserError(f"{error}; then repeat the command, {KEPT}") from None
            time.sleep(1)


def _check_address(address: str) -> None:
    """Raise UserError unless somebody listens at an address."""
    if address == "auto":
        return
    found = re.fullmatch(r"\[?([^\[\]/\s]+?)\]?:(\d{1,5})", address)
    if not found or int(found[2]) > 65535:
        raise UserError(
            f"--ray: expected HOST:PORT of a cluster of which this machine is a node, or auto, found {address!r}; begin a cluster with "
            "ray start --head, which prints the address"
        )
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"--ray: expected a Ray cluster at {address}, found: {error.strerror or error}; begin one with ray start --head, which prints "
            "its address"
        ) from None


@contextlib.contextmanager
def _marked(job: Job, tasks: Sequence[int]) -> Iterator[Wanted]:
    """Yield the work, with a new file in the job's folder, by which a node knows that it sees that folder."""
    mark = job.folder / f"shared-{uuid.uuid4().hex}"
    mark.touch()
    files = tuple((place, "" if place.is_remote else place.mark()) for place in job.corpus.places)
    try:
        yield Wanted(job, tuple(tasks), mark.name, os.getcwd(), Tokenizer(job.tokenizer).digest, files)
    finally:
        mark.unlink(missing_ok=True)


def _see(job: Job, task: int) -> None:
    """Wait until the result of a task is seen here. Network disks may take a moment."""
    until = time.monotonic() + SEEN_SECONDS
    while read_result(job, task) is None:
        if time.monotonic() > until:
            raise UserError(
                f"{job.folder}: expected the result of task {task:,}, which a node has written, found none after "
                f"{duration(SEEN_SECONDS)}; choose an --output on a disk that all nodes share"
            )
        time.sleep(0.2)
        os.listdir(job.folder)


# The driver.


def main() -> None:
    """Encode on the cluster whose address is the argument. The work comes on standard input. End when that ends."""
    say = answering()
    try:
        import ray

        ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
        say("connected", _in_words(ray))
        wanted_version, tasks, wanted = pickle.load(sys.stdin.buffer)  # of the process that started this one
        stopped = threading.Event()
        threading.Thread(target=_watch, args=(stopped,), daemon=True).start()
        drive(ray, wanted_version, tasks, wanted, say, stopped)
        stopped.wait()
    except UserError as error:
        say("failed", str(error))
    except EOFError:  # there is no work
        pass
    except Exception as error:
        say("failed", _first_line(error))


def drive(
    ray: Any,
    wanted_version: str,
    tasks: Sequence[int],
    wanted: bytes,
    say: Callable[[str, Any], None],
    stopped: threading.Event,
) -> None:
    """Encode tasks on a cluster, and say which are done. Cancel them once ``stopped`` is set.

    Raises UserError if a task fails, is lost too often, or if no node is left.
    """
    encode = ray.remote(num_cpus=1, max_retries=0)(encode_on_node())
    shared = ray.put(wanted)
    waiting, running, losses, nodes = list(reversed(tasks)), dict[Any, int](), _Losses(say), _Nodes(ray, say)
    try:
        while (waiting or running) and not stopped.is_set():
            while waiting and len(running) < AT_ONCE:
                task = waiting.pop()
                running[encode.remote(shared, wanted_version, task)] = task
            lost: dict[int, Exception] = {}
            for ref in ray.wait(list(running), num_returns=len(running), timeout=LOOK_SECONDS)[0]:
                task = running.pop(ref)
                try:
                    failed = ray.get(ref)
                except ray.exceptions.RayTaskError:
                    raise  # a fault of the program
                except ray.exceptions.LocalRayletDiedError:
                    say("lost", None)  # the node of this process, which is of no use any more
                    return
                except ray.exceptions.RayError as error:
                    lost[task] = error
                    continue
                if failed:
                    raise UserError(failed)
                say("done", task)
            losses.note(lost)
            waiting += lost
            nodes.look()
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_SECONDS)


class _Losses:
    """How often each task was lost with its process or its node."""

    def __init__(self, say: Callable[[str, Any], None]):
        self._say, self._counts = say, Counter[int]()

    def note(self, lost: dict[int, Exception]) -> None:
        """Tell which tasks are lost. Raises UserError if one was lost too often."""
        if not lost:
            return
        reason = "; ".join(sorted({f"{type(error).__name__}: {_first_line(error)}" for error in lost.values()}))
        self._counts.update(lost.keys())
        task, count = self._counts.most_common(1)[0]
        if count >= ATTEMPTS:
            raise UserError(
                f"--ray: expected a process that encodes shard {task:,}, found that {count} were lost with it ({reason}); see the logs "
                f"of Ray, and repeat the command, {KEPT}"
            )
        names = ", ".join(f"{task:,}" for task in sorted(lost)[:10]) + ", ..." * (len(lost) > 10)
        self._say("told", f"lost the process or node that did shard {names} ({reason}); done again: {len(lost)}")


class _Nodes:
    """The nodes of a cluster, of which it is told when they come and go."""

    def __init__(self, ray: Any, say: Callable[[str, Any], None]):
        self._ray, self._say = ray, say
        self._names, self._looked = _names(ray), time.monotonic()
        self._lonely: float | None = None

    def look(self) -> None:
        """Look at the nodes now and then. Raises UserError if there was none with a CPU for a while."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        names, before = _names(self._ray), self._names
        self._names = names
        for node in sorted(before.keys() - names.keys()):
            self._say("told", f"node {before[node]} is lost; the others do its shards again, {len(names)} are left")
        for node in sorted(names.keys() - before.keys()):
            self._say("told", f"node {names[node]} has joined, {len(names)} are there")
        if names:
            self._lonely = None
        elif self._lonely is None:
            self._lonely = now
            self._say("told", f"no node with a CPU is there; waiting up to {duration(LONELY_SECONDS)} for one")
        elif now - self._lonely > LONELY_SECONDS:
            raise UserError(
                f"--ray: expected a node with a CPU, found none for {duration(LONELY_SECONDS)}; start nodes ({START}) and "
                f"repeat the command, {KEPT}"
            )


def _names(ray: Any) -> dict[str, str]:
    """Return the names of the nodes that have a CPU, by their ids."""
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    }


def _in_words(ray: Any) -> str:
    nodes = len(_names(ray))
    cpus, free = (int(found.get("CPU", 0)) for found in (ray.cluster_resources(), ray.available_resources()))
    return f"a shard at a time on each CPU of the cluster: {nodes} nodes, {cpus:,} CPUs, {free:,} of them free"


def _first_line(error: BaseException) -> str:
    """Return the first sentence of an error, or the last line of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if "Traceback" in str(error) else lines[0]
    return line.partition(". ")[0].rstrip(".")[:200]


def _watch(stopped: threading.Event) -> None:
    """Set ``stopped`` at the end of standard input. End the process if the cluster does not let it end."""
    sys.stdin.buffer.read()
    stopped.set()
    time.sleep(CANCEL_SECONDS + 1)
    os._exit(1)
