"""JAX looks for no TPU where none is, says so in a line, and looks wherever something tells of one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llama_jax.devices import absent_tpu
from llama_jax.devices.absent_tpu import tells_of_tpu
from tests.commands import ROOT


def pci(root: Path, vendor: str, kind: str) -> Path:
    device = root / "sys/bus/pci/devices" / f"0000:00:0{len(list(root.rglob('vendor')))}.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    return root


def node(root: Path, name: str) -> Path:
    path = root / "dev" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return root


def test_chips_their_drivers_and_variables_tell_of_a_tpu(tmp_path: Path) -> None:
    assert tells_of_tpu(pci(tmp_path / "chip", "0x1ae0", "0x120000"), {})
    assert tells_of_tpu(pci(tmp_path / "a chip to come", "0x1ae0", "0xff0000"), {})
    assert tells_of_tpu(node(tmp_path / "older driver", "accel0"), {})
    assert tells_of_tpu(node(tmp_path / "newer driver", "vfio/0"), {})
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_PROCESS_ADDRESSES"):
        assert tells_of_tpu(tmp_path, {name: "x"})


def test_a_laptop_and_a_cloud_machine_without_a_tpu_tell_of_none(tmp_path: Path) -> None:
    laptop = pci(pci(tmp_path / "laptop", "0x8086", "0x030000"), "0x8086", "0x120000")
    node(node(laptop, "vfio/vfio"), "accel/accel0")  # every Linux has the first, Intel's own accelerators the second
    cloud = pci(pci(tmp_path / "cloud", "0x1ae0", "0x020000"), "0x1ae0", "0x010802")
    without_buses = tmp_path / "container"
    for root in (laptop, cloud, without_buses):
        assert not tells_of_tpu(root, {"PATH": "/bin", "TPU_LIBRARY_PATH": "libtpu.so", "TPU_SKIP_MDS_QUERY": "1"})


SCRIPT = """
import jax
from llama_jax.devices import absent_tpu
absent_tpu._has_libtpu = lambda: {libtpu}
absent_tpu._has_other_plugins = lambda: {plugins}
absent_tpu.tells_of_tpu = lambda: {tpu}
print(absent_tpu.skip_absent_tpu("training"))
print(jax.config.jax_platforms)
"""


def decided(libtpu: bool = True, plugins: bool = False, tpu: bool = False, **environment: str) -> list[str]:
    """What is said, and which platforms JAX is left with."""
    script = SCRIPT.format(libtpu=libtpu, plugins=plugins, tpu=tpu)
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", absent_tpu.FORCED)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_tpu_the_cpu_is_taken_and_a_line_says_so() -> None:
    assert decided() == [
        "no TPU found: training on the CPU (JAX_PLATFORMS=tpu has JAX look for one all the same)",
        "cpu",
    ]


@pytest.mark.parametrize(
    ("what", "platforms"),
    [
        ({"tpu": True}, "None"),
        ({"libtpu": False}, "None"),
        ({"plugins": True}, "None"),
        ({"JAX_PLATFORMS": "tpu"}, "tpu"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu"),
        ({"JAX_FORCE_TPU_INIT": "1"}, "tpu,cpu"),
    ],
    ids=str,
)
def test_nothing_is_decided_where_a_tpu_may_be_or_where_somebody_chose(what: dict, platforms: str) -> None:
    if what == {"JAX_FORCE_TPU_INIT": "1"} and find_spec("libtpu") is None:
        platforms = "None"
    assert decided(**what) == ["", platforms]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, whose errors are looked for")
@pytest.mark.skipif(tells_of_tpu(), reason="needs a machine without a TPU")
def test_with_libtpu_and_no_tpu_nothing_is_printed_when_jax_starts() -> None:
    script = "from llama_jax.devices.absent_tpu import skip_absent_tpu; print(skip_absent_tpu('x')); import jax; print(jax.devices())"
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == "" and done.stdout.splitlines()[1] == "[CpuDevice(id=0)]"
