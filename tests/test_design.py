"""The step lists of docs/design.md: each is followed here, through the tables and functions that it names."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.cli.flags import parse_flags
from llama_jax.config import MeshArgs, SampleArgs
from llama_jax.devices import sharding
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import constrain, make_mesh, on_mesh, parameter_shardings
from llama_jax.errors import UserError
from llama_jax.generation import sampling
from llama_jax.generation.sampling import Filter, make_sampler, sample
from llama_jax.ops import quantize as quantize_module
from llama_jax.ops.linear import linear
from tests.commands import ROOT
from tests.eight_devices import run_on_eight_devices


@dataclasses.dataclass(frozen=True)
class WithAtLeast(SampleArgs):
    """SampleArgs with one more field, as step 1 has it: a rule that leaves out tokens less likely than a fixed probability."""

    at_least: float = 0.0
    """Sample from tokens at least this probable; 0: from all."""

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        if not 0 <= self.at_least <= 1:
            raise UserError(f"{prefix}at_least: expected 0.0 or more, up to 1, found {self.at_least}")


def at_least(probs: jax.Array, value: jax.Array) -> jax.Array:
    """The rule, as step 2 has it; the likeliest token stays."""
    border = jnp.minimum(value[:, None], jnp.max(probs, axis=-1, keepdims=True))
    return jnp.where(probs >= border, probs, 0.0)


def test_a_sampling_rule_is_a_field_a_function_and_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampling.FILTERS, "at_least", Filter(0.0, at_least))
    probs = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)

    def drawn(*rows: WithAtLeast) -> list[set[int]]:
        sampler = make_sampler([([], args, 0) for args in rows], len(probs))
        logits = jnp.broadcast_to(jnp.log(probs), (len(rows), len(probs)))
        step = jax.jit(jax.vmap(lambda number: sample(sampler, logits, jnp.full(len(rows), number))[0]))
        return [set(ids.tolist()) for ids in np.asarray(step(jnp.arange(400))).T]

    plain = WithAtLeast(temperature=1.0, top_p=1.0)
    rule = dataclasses.replace(plain, at_least=0.15)
    assert drawn(plain, rule) == [{0, 1, 2, 3, 4}, {1, 3, 4}], "each row has its own value"
    assert drawn(dataclasses.replace(rule, at_least=0.9)) == [{1}], "the likeliest stays"
    assert drawn(dataclasses.replace(rule, top_k=2)) == [{1, 3}], "it works together with the others"
    assert "at_least" not in make_sampler([([], plain, 0)], 5).filters, "what nobody asks for costs nothing"

    default = WithAtLeast()
    flagged = parse_flags(WithAtLeast, ["--at-least", "0.2"], default, "sample.py", "")
    assert flagged == dataclasses.replace(default, at_least=0.2), "the field is a flag"
    with pytest.raises(UserError, match=r"^prompt 3: at_least: expected 0\.0 or more, up to 1, found 2\.0"):
        dataclasses.replace(rule, at_least=2.0).check("prompt 3: ")


def test_every_rule_of_the_table_is_a_field_of_sample_args_that_is_off_by_its_value() -> None:
    fields = {field.name for field in dataclasses.fields(SampleArgs)}
    for name, rule in sampling.FILTERS.items():
        assert name in fields, name
        off = dataclasses.replace(SampleArgs(temperature=1.0, top_p=1.0), **{name: rule.off})
        off.check()
        assert name not in make_sampler([([], off, 0)], 5).filters


class Experts(nn.Module):
    """A module with a parameter of the new axis, as step 2 has it. Letters: B batch, T positions, D dim, E experts."""

    @nn.compact
    def __call__(self, token_ids: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("experts", "embed"))
        w = self.param("w", init, (8, 16))
        y = jnp.einsum("BTD,ED->BTE", jax.nn.one_hot(token_ids, 16), w)
        return jnp.sum(constrain(y, "batch", "length", "experts"), axis=-1)


def lay_out_experts() -> dict[str, object]:
    """On eight devices: the parameter's sharding, its part on one device, and the largest difference from one device's result."""
    sharding.RULES["experts"] = "tensor"
    model, token_ids = Experts(), jnp.arange(12).reshape(4, 3)
    params = nn.unbox(model.init(jax.random.key(0), token_ids)["params"])
    wanted = model.apply({"params": params}, token_ids)
    mesh = make_mesh(MeshArgs(data=2, tensor=4))
    laid = jax.device_put(params, parameter_shardings(model, mesh))
    with on_mesh(mesh):
        found = jax.jit(lambda params: model.apply({"params": params}, token_ids))(laid)
    return {
        "axes": list(laid["w"].sharding.spec),
        "on one device": list(laid["w"].addressable_shards[0].data.shape),
        "difference": float(jnp.max(jnp.abs(found - wanted))),
    }


def test_a_logical_axis_is_a_line_of_the_table_and_a_name_at_the_parameter() -> None:
    found = run_on_eight_devices("tests.test_design")
    assert found["axes"] == ["tensor", "fsdp"]
    assert found["on one device"] == [2, 16], "eight experts over four devices"
    assert found["difference"] < 1e-5


def test_a_weight_kind_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize_module.KINDS, "int2", quantize_module.Kind(jnp.int2, 16))
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(32, 4, 6)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(2, 3, 32)).astype(np.float32))
    matrix = quantize_module.quantize(w, 1, "int2")
    assert matrix.shape == w.shape and bytes_of(matrix) == 32 * 24 // 4 + 2 * 24 * 4
    assert set(np.asarray(matrix.values, np.int32).ravel()) == {-1, 0, 1}
    found = jax.jit(lambda x, w: linear("BTD,DNH->BTNH", x, w))(x, matrix)
    np.testing.assert_allclose(found, jnp.einsum("BTD,DNH->BTNH", x, matrix.dequantized()), atol=1e-4)


def test_the_step_lists_name_files_and_names_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    lists = text.split("## How to add")[1:]
    assert len(lists) == 3
    for part in lists:
        assert re.findall(r"^\d\. ", part, re.MULTILINE), part
        for path, name in re.findall(r"`((?:llama_jax|tests)/[\w/]+\.py)`(?:: `(\w+)`)?", part):
            assert (ROOT / path).is_file(), path
            if name:
                assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path}: {name}"


def test_every_room_is_described_and_imports_point_the_way_that_the_page_says() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    order = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text.split("## The rooms")[1], re.MULTILINE)
    rooms = {
        path.stem for path in (ROOT / "llama_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(order) == sorted(rooms - {"__init__", "__main__"})
    for path in (ROOT / "llama_jax").rglob("*.py"):
        room = room_of(path)
        for other in imported(path):
            assert other == room or room in ("__init__", "__main__") or order.index(other) > order.index(room), (
                f"{path} imports {other}, which the page has above {room}"
            )


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "llama_jax").parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """The rooms that a file of the package imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("llama_jax.")}
    return found & {room_of(p) for p in (ROOT / "llama_jax").rglob("*.py")}


if __name__ == "__main__":
    print(json.dumps(lay_out_experts()))
