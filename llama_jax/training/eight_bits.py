"""How a training step computes its products in eight bits, on what, and what the run says of it."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.devices.chips import EIGHT_BIT_FLOPS, PEAK_FLOPS
from llama_jax.errors import UserError
from llama_jax.ops.eight_bit import Copies, EightBit, both_ways
from llama_jax.ops.parameters import AXES
from llama_jax.ops.remat import PRODUCTS
from llama_jax.seeds import random_key
from llama_jax.train_args import TrainArgs
from llama_jax.training.adapting import steps_taken

# What the random bits of a step are for, beside those of pieces.py.
ROUNDING = 2
# What a product in eight bits is named in what a run prints.
NAMES = {"int8": "8-bit integers", "fp8": "8-bit floats (e4m3, gradients e5m2)"}


def asked(args: TrainArgs) -> TrainArgs | None:
    """Return the settings if they ask for products in eight bits, or None."""
    return None if args.products == "float" else args


def copies(args: TrainArgs, params: Any) -> dict[str, Copies]:
    """Return the layers' matrices in eight bits, by name and quantized both ways: once a step, each shard in its place.

    Each part of the batch, and each layer forward and backward, multiplies by these.
    """
    kind, of = args.products, tuple(args.products_of.split(","))

    def made(name: str, w: jax.Array) -> Copies:
        # The first axis is of the layers. The embedding's axis is alone, and the other side may have two.
        border = 2 if AXES[name][0] == "embed" else w.ndim - 1
        return both_ways(w, range(1, border), range(border, w.ndim), kind, of)

    layers = ((path[-1].key, w) for path, w in jax.tree_util.tree_leaves_with_path(params["layers"]))
    return {name: made(name, w) for name, w in layers if name in PRODUCTS}


def in_step(args: TrainArgs, params: Any, made: dict[str, Copies], opt_state: Any, rows: jax.Array) -> Any:
    """Return the parameters with the layers' matrices as EightBit, for the step that ``opt_state`` has reached.

    made: their ``copies``.
    rows: the rows of the batch, int [B], in this part of it. Random rounding follows from the seed, the step, the first
    row, the layer and the matrix, so that it is the same on every mesh and after a resume.
    """
    key = jax.random.fold_in(jax.random.fold_in(random_key(args.seed), steps_taken(opt_state)), ROUNDING)
    of = tuple(args.products_of.split(","))
    key = jax.random.fold_in(key, rows[0])

    def one(path: Any, w: jax.Array) -> Any:
        if (name := path[-1].key) not in PRODUCTS:
            return w
        bits = jax.random.bits(jax.random.fold_in(key, PRODUCTS.index(name)), (len(w), 2), jnp.uint32)
        return EightBit(w, *made[name], bits, args.products, of)

    return {**params, "layers": jax.tree_util.tree_map_with_path(one, params["layers"])}


def check_units(kind: str, device: jax.Device) -> str:
    """Return what to say of products of ``kind`` on ``device``: nothing of float.

    Raises UserError if it is known to have no units for them.
    """
    if kind == "float":
        return ""
    name, peaks = device.device_kind, EIGHT_BIT_FLOPS[kind]
    if name not in PEAK_FLOPS:
        known = "is for tests, and no faster" if device.platform == "cpu" else "may be slower: its rates are not known"
        return f"train.products {kind} on a {name} {known}"
    has = [other for other, rates in EIGHT_BIT_FLOPS.items() if name in rates]
    if name not in peaks:
        other = " and ".join(["bfloat16", *has])
        raise UserError(
            f"train.products: expected a kind that a {name} multiplies, {other}, found {kind}; "
            f"give --train.products {has[0] if has else 'float'}"
        )
    if peaks[name] <= PEAK_FLOPS[name]:
        rate = f"{peaks[name] / 1e12:.0f} tera-operations a second of both"
        return f"train.products {kind} on a {name} is no faster than bfloat16: {rate}"
    return f"train.products {kind} was not timed on a {name}: compare a few steps of it with float's"


def products_text(args: TrainArgs, dtype: str) -> str:
    """Return what a run, or a plan, says of its products in eight bits. ``dtype``: the type of all else."""
    names = args.products_of.split(",")
    rest = [name for name in ("forward", "input", "weight") if name not in names]
    floats = f"; {' and '.join(rest)} in {dtype}" if rest else ""
    rounding = ", gradients rounded at random" if args.products == "int8" and names != ["forward"] else ""
    return (
        f"{NAMES[args.products]} for {', '.join(names)} of the layers' matrices{rounding}{floats}; "
        f"the rest, evaluation included, in {dtype}; MFU is of bfloat16's peak"
    )
