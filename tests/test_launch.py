"""docs/launch.md: what of its recipes can run on one machine, and that every flag in them is one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_jax.training.command import read_command
from tests.commands import ROOT
from tests.processes import flags, free_address

PAGE = (ROOT / "docs" / "launch.md").read_text()
AGAIN = ROOT / "scripts" / "again"


def blocks(language: str) -> list[str]:
    return [
        text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if kind == language
    ]


@pytest.mark.parametrize(
    ("statuses", "starts", "ends"),
    [((75, 76, 75, 0), 4, 0), ((76, 2), 2, 2), ((130,), 1, 130), ((1,), 1, 1), ((75, 137), 2, 137)],
)
def test_again_starts_a_command_again_on_75_and_76_and_ends_with_any_other_status(
    tmp_path: Path, statuses: tuple[int, ...], starts: int, ends: int
) -> None:
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    command = 'echo "$@" >> started; s=$(head -1 statuses); sed -i 1d statuses; exit $s'
    done = subprocess.run(
        [AGAIN, "bash", "-c", command, "-", "one", "two words"],
        cwd=tmp_path, env=os.environ | {"PAUSE": "0"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == ends
    assert (tmp_path / "started").read_text() == "one two words\n" * starts, "the arguments as they were given"
    assert done.stderr.count("starting again") == starts - 1, "it says so"


def start_again(folder: Path, address: str, index: int) -> subprocess.Popen[str]:
    """One of two processes of a job, under scripts/again."""
    job = {"coordinator_address": address, "num_processes": 2, "process_id": index, "timeout_seconds": 120}
    argv = flags(train__save_dir=folder, train__max_steps=400, train__save_interval=400,
                 **{f"distributed__{key}": value for key, value in job.items()})  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PAUSE": "1"}
    return subprocess.Popen(
        [AGAIN, sys.executable, ROOT / "train.py", *argv],
        env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder: Path, step: int) -> int:
    deadline = time.monotonic() + 120
    while (found := (steps(folder) or [0])[-1]) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def python_of(again: subprocess.Popen[str]) -> int:
    """The process number of what ``again`` runs now."""
    return int(subprocess.run(["pgrep", "-P", str(again.pid)], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_job_under_again_goes_on_after_a_signal_and_after_the_loss_of_a_process(tmp_path: Path) -> None:
    folder, address = tmp_path / "run", free_address()
    job = [start_again(folder, address, index) for index in range(2)]
    try:
        reached = wait_for_step(folder, 5)
        os.kill(python_of(job[1]), signal.SIGTERM)  # as a scheduler does: all end with 75, saved, and start again
        reached = wait_for_step(folder, reached + 20)
        os.kill(python_of(job[1]), signal.SIGKILL)  # as a machine that fails: the other ends with 76
        assert job[1].wait(60) == 128 + signal.SIGKILL
        lost = job[1].communicate()[1]
        job[1] = start_again(folder, address, 1)  # the machine comes back
        (out, err), (other_out, other_err) = (process.communicate(timeout=240) for process in job)
    finally:
        for process in job:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in job] == [0, 0], err + other_err
    assert steps(folder) == list(range(1, 401)), "no step is missing or twice"
    assert err.count("again: exit status 75") == 1 and err.count("again: exit status 76") == 1
    assert lost.count("again: exit status 75") == 1 and "again:" not in other_err
    assert out.count("run folder") == 3 and other_out == "", "process 0 alone prints, at every start"


BOOT = next(text for text in blocks("bash") if "worker-network-endpoints" in text)
FIND = BOOT[BOOT.index("mapfile") : BOOT.index("scripts/again")]


@pytest.mark.parametrize(
    ("endpoints", "host", "addresses", "found"),
    [
        ("llama-1wjb,llama-1z9d,llama-x000", "llama-1z9d", "10.0.0.4", ("llama-1wjb:8476", "3", "1")),
        ("unknown:unknown:10.0.0.3,unknown:unknown:10.0.0.4", "llama-1z9d", "10.0.0.4 172.17.0.1", ("10.0.0.3:8476", "2", "1")),
        ("llama-1wjb", "llama-1wjb", "10.0.0.3", None),
        ("", "llama", "10.0.0.3", None),
    ],
)  # fmt: skip
def test_the_boot_script_of_a_tpu_vm_finds_its_number_among_the_machines_of_its_slice(
    endpoints: str, host: str, addresses: str, found: tuple[str, str, str] | None
) -> None:
    fake = f"""
    curl() {{ [ -n "{endpoints}" ] && printf %s "{endpoints}" || return 22; }}
    hostname() {{ if [ "$1" = -I ]; then echo "{addresses} "; else echo {host}; fi; }}
    """
    done = subprocess.run(
        ["bash", "-c", fake + FIND + '\nprintf "%s\\n" "${job[@]}"'], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    values = done.stdout.split()[1::2]
    assert values == ([] if found is None else [*found, "3600"])


def test_a_machine_that_its_slice_does_not_list_is_told() -> None:
    fake = "curl() { printf a,b; }; hostname() { echo c; };"
    done = subprocess.run(["bash", "-c", fake + FIND], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "this machine is not in the list of its slice: a b" in done.stderr


def documents() -> list[dict[str, Any]]:
    return [document for text in blocks("yaml") for document in yaml.safe_load_all(text)]


def containers(value: Any) -> list[dict[str, Any]]:
    """All containers of a manifest, however deep."""
    if isinstance(value, dict):
        own = value.get("containers", [])
        return own + [found for child in value.values() for found in containers(child)]
    return [found for child in value for found in containers(child)] if isinstance(value, list) else []


def trainings() -> list[list[str]]:
    """The arguments of train.py in every recipe."""
    found = [
        container["args"][1:]
        for d in documents()
        for container in containers(d)
        if container.get("args", [""])[0] == "train.py"
    ]
    for text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if re.search(r"python train\.py --config", line):
                line = re.sub(r'"\$\{job\[@\]\}"|> train.log.*', "", line)
                found.append(shlex.split(line.partition("train.py")[2]))
    return found


def test_every_training_of_a_recipe_is_a_command_that_train_py_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(trainings()) == 5
    for argv in trainings():
        config, _ = read_command(argv)
        assert config.data.filepath.endswith("tokens") and config.train.save_dir, argv


def test_the_manifests_are_sound() -> None:
    kinds = [d["kind"] for d in documents()]
    assert kinds == ["PersistentVolumeClaim", "Job", "Service", "Job", "JobSet"]
    claim, _, service, job, jobset = documents()
    (inner,) = jobset["spec"]["replicatedJobs"]
    for spec in (job["spec"], inner["template"]["spec"]):
        pod = spec["template"]["spec"]
        chips = 1
        for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips *= int(size)
        assert (
            spec["completions"]
            == spec["parallelism"]
            == chips // pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        )
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
        fatal = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
        assert [rule["onExitCodes"]["values"] for rule in fatal] == [[2]]
    ignored = [rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]
               if rule["action"] == "Ignore" and "onExitCodes" in rule]  # fmt: skip
    assert ignored == [[75, 76]]
    assert service["metadata"]["name"] == service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


@pytest.mark.parametrize("text", blocks("bash"))
def test_every_block_is_a_script_that_bash_reads(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
