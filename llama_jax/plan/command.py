"""The command ``python -m llama_jax.plan``: print what is planned, compile it, print the result, and advise."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.cli.progress import duration
from llama_jax.config import Config
from llama_jax.devices.sharding import describe
from llama_jax.errors import UserError
from llama_jax.plan import Decoding, Kind, Plan, Reference, extras, plan_step, probe, summaries, tables
from llama_jax.plan.advice import Advice, advise_decoding, advise_training, smallest_slice
from llama_jax.plan.apart import CompilerError, run_apart
from llama_jax.plan.arguments import Request
from llama_jax.plan.decoding import Layout, fewest_chips, lay_out
from llama_jax.plan.outputs import Outputs
from llama_jax.plan.picture import draw_search
from llama_jax.plan.search import Search, error_rows, errors_summary, estimates_of, ranked, ratio, row_text
from llama_jax.plan.settings import Epoch, Found, epoch_of, run_tokens, vocabulary, with_vocabulary
from llama_jax.plan.tables import Rows
from llama_jax.plan.topology import HOST_CHIPS, Topology
from llama_jax.plan.tuning_data import with_masks
from llama_jax.programs import named
from llama_jax.training.command import DEFAULT
from llama_jax.training.objective import Dpo, Objective, make_objective

FITS, DOES_NOT_FIT = 0, 1
# Seconds between two lines that say that the compiler is still running.
BEAT = 30
HOW_LONG = "compiling: seconds for a small model, 1 to 5 minutes for a large one"


class Console:
    """Prints progress on standard output, or on standard error if standard output carries JSON."""

    def __init__(self, as_json: bool):
        self._stream = sys.stderr if as_json else sys.stdout

    def say(self, rows: Rows) -> None:
        """Print rows of a name and a text."""
        self.print(tables.table(rows))

    def print(self, line: str) -> None:
        """Print a line as it is."""
        print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[Callable[[float], None]]:
        """Yield a function to call repeatedly with the seconds that the compiler has been running."""
        terminal, told = self._stream.isatty(), 0.0

        def beat(seconds: float) -> None:
            nonlocal told
            if seconds - told >= (1 if terminal else BEAT):
                told = seconds
                line = tables.table([("", f"compiling for {duration(seconds)} so far")])
                print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=self._stream, flush=True)

        try:
            yield beat
        finally:
            if terminal and told:
                print("\r\x1b[K", end="", file=self._stream, flush=True)


@dataclass(frozen=True)
class Task:
    """A step to plan, with the lines printed before it is compiled, and functions to report and advise."""

    config: Config
    topology: Topology
    kind: Kind
    before: Rows
    summary: Callable[[Plan], dict[str, Any]]
    text: Callable[[Plan], str]
    advise: Callable[[Plan], Iterator[Advice]]
    epoch: Epoch | None = None


def run(request: Request) -> int:
    """Plan the requested step. Return the exit status. Raises UserError if it cannot be planned."""
    args, topology = request.args, request.topology
    found = vocabulary(request.config, "data.vocab_size" in request.stated)
    request = dataclasses.replace(request, config=with_vocabulary(request.config, int(found.value or 0)))
    if not args.decode:
        masked, notes = with_masks(request.config)
        request = dataclasses.replace(request, config=masked, notes=request.notes + notes)
    request.config.check()
    console, before = Console(args.json), tables.model_rows(request.config, found)
    before += [("", note) for note in request.notes]
    before += [("", note) for note in _undecided(request)]
    if not topology.is_offered:
        _check_slice(topology)
        before.append(("slice", f"{topology.name} is not in Google's tables; the nearest: {topology.nearest}"))
    if topology.chip.devices > 1:
        before.append((
            "devices",
            f"JAX has two devices a chip of {topology.version}: {topology.chips:,} chips, {topology.device_count:,} devices; what follows is of a "
            "device, which has half of a chip's memory, peak and links",
        ))  # fmt: skip
    if topology.is_gpu:
        before.append(("time", "lower bounds: for a GPU the compiler tells memory exactly, but no schedule"))
    outputs = Outputs.check(args.hlo, args.output, "output" in request.given)
    if args.search:
        return _search(request, console, before, outputs)
    task = (_decoding if args.decode else _training)(request, console)
    return _plan(task, request, console, before + task.before, outputs)


def _undecided(request: Request) -> list[str]:
    """Return what the defaults decide, because no file, no checkpoint and no flag does."""
    notes, from_checkpoint = [], bool(request.config.train.init_from)
    if request.file is None and (request.args.decode or not from_checkpoint):
        other = f"; {named('train')} without --config takes those of --config {DEFAULT}" * (not request.args.decode)
        notes.append(f"no --config: settings are the defaults and the flags{other}")
    elif not from_checkpoint and not any(name.startswith("model.") for name in request.stated):
        notes.append(
            "no setting of [model]: the model is the default one; --train.init-from gives a checkpoint's shape, --model.* any other"
        )
    return notes


def _check_slice(topology: Topology) -> None:
    """Raise UserError if the compiler does not know a slice that is in no table."""
    try:
        run_apart(lambda _: probe(topology))
    except CompilerError as error:
        raise topology.refused(str(error)) from None


def _plan(task: Task, request: Request, console: Console, before: Rows, outputs: Outputs) -> int:
    """Compile a step, print the result, advise if it does not fit, and write the files."""
    args = request.args
    plan = _compiled(task.config, task.topology, task.kind, console, [*before, ("", HOW_LONG)])
    if not args.json:
        print(task.text(plan), flush=True)
    more = _more_of_training(plan, task.epoch, console) if plan.decoding is None else {}
    written, advice = outputs.write(plan), []
    if not plan.fits:
        tries = f"at most {args.advice} are compiled" if args.advice else "none is compiled"
        console.say([("", f"looking for settings that fit: {tries}")])
        advice = list(task.advise(plan))
    if args.json:
        print(json.dumps(task.summary(plan) | more | {"advice": [a.summary() for a in advice]}), flush=True)
    elif not plan.fits:
        print(tables.table(tables.advice_rows(request.topology, advice)), flush=True)
    if written:
        console.say(written)
    return FITS if plan.fits else DOES_NOT_FIT


def _more_of_training(plan: Plan, epoch: Epoch | None, console: Console) -> dict[str, Any]:
    """Compile what else tells the cost of training, and print it. Return it for ``--json``."""
    if isinstance(plan.objective, Dpo):
        return _reference_cost(plan, plan.objective, epoch, console)
    return _mask_cost(plan, console) if plan.config.data.document_mask else {}


def _reference_cost(plan: Plan, objective: Dpo, epoch: Epoch | None, console: Console) -> dict[str, Any]:
    """Compile the pass over the preferences that comes before the first step, and print what it costs."""
    first, said = None, "the pass over the preferences before the first step"
    if plan.fits:
        first = _tried(said, plan.config, plan.topology, Reference(objective), console)
    cost = extras.reference_cost(plan, first, epoch)
    console.say(extras.reference_rows(plan, cost))
    return {"reference": cost}


def _mask_cost(plan: Plan, console: Console) -> dict[str, Any]:
    """Compile the step without its document mask, and print what the mask costs. Return it for ``--json``."""
    without = None
    if plan.fits:
        data = dataclasses.replace(plan.config.data, document_mask=False)
        config = dataclasses.replace(plan.config, data=data)
        said = "the same step without document masks, to compare"
        without = _tried(said, config, plan.topology, plan.objective, console)
    cost = extras.mask_cost(plan, without)
    console.say(extras.mask_rows(plan, cost))
    return {"document_mask_cost": cost}


def _training(request: Request, console: Console) -> Task:
    config, topology, args = request.config, request.topology, request.args
    length, epoch, objective = _length(config, args.tokens)
    before: Rows = []
    if config.train.compute_dtype == "float32":
        what = "a GPU" if topology.is_gpu else "a TPU"
        before.append(
            ("type", f"float32, as train.compute_dtype says; {what} multiplies bfloat16 several times as fast")
        )

    def compile_(flags: str, other: Config) -> Plan | None:
        return _tried(flags, other, topology, objective, console)

    def advise(plan: Plan) -> Iterator[Advice]:
        return advise_training(config, plan, args.advice, compile_)

    return Task(
        config, topology, objective, before, lambda plan: summaries.summary(plan, length, epoch),
        lambda plan: tables.training_text(plan, length), advise, epoch,
    )  # fmt: skip


def _length(config: Config, tokens: float | None) -> tuple[Found, Epoch | None, Objective]:
    """Return the tokens of a run, an epoch of it if it is known and wanted, and the objective."""
    prefers = config.train.objective == "dpo"
    known = epoch_of(config) if prefers or (tokens is None and config.train.max_steps is None) else (None, "")
    most = known[0].most_pairs if known[0] is not None else 1
    return run_tokens(config, tokens, known), known[0], make_objective(config, most)


def _decoding(request: Request, console: Console) -> Task:
    """Return the task of a decoding step, on a mesh chosen for the slice as in sample.py unless flags give one."""
    config, topology, args = request.config, request.topology, request.args
    context, fixed = config.model.max_seq_len, any(flag.startswith("mesh.") for flag in request.given)
    slots = args.slots if "slots" in request.given else min(args.slots, context)
    wanted = Decoding(args.batch, slots, args.weights, args.cache)
    before, part = _ignored(request), topology
    if slots > context:
        before.append(("", f"--slots {slots:,} is more than the model's context, {context:,}: no sequence fills it"))
    if not fixed:
        layout = lay_out(config, topology, wanted)
        config, part = dataclasses.replace(config, mesh=layout.mesh), layout.topology
        before += _mesh_rows(request, layout)
    most = HOST_CHIPS[topology.version]
    if part.chips > most:
        before.append(
            ("", f"{named('sample')} is one process, on the chips of one host, {most} of {topology.version} at most")
        )

    def compile_(flags: str, other: Config, part: Topology, decoding: Decoding) -> Plan | None:
        return _tried(flags, other, part, decoding, console)

    def advise(plan: Plan) -> Iterator[Advice]:
        return advise_decoding(request.config, plan, topology, args.advice, fixed, compile_)

    return Task(
        config, part, wanted, before, lambda plan: summaries.decode_summary(plan, topology), lambda plan: tables.decoding_text(plan, topology),
        advise,
    )  # fmt: skip


def _ignored(request: Request) -> Rows:
    """Return lines about settings of the file that do not count for decoding."""
    file, default = request.file, Config()
    if file is None:
        return []
    settings = {
        "[mesh]": (file.mesh, default.mesh),
        "train.compute_dtype": (file.train.compute_dtype, request.config.train.compute_dtype),
        "[lora]": (file.lora, default.lora),
    }
    found = [name for name, (stated, other) in settings.items() if stated != other]
    merged = ": an adapter is merged into plain matrices"
    return [("", f"{name} in the file is for training and is ignored{merged * (name == '[lora]')}") for name in found]


def _mesh_rows(request: Request, layout: Layout) -> Rows:
    """Return lines that say why this mesh was chosen, and how to give it to sample.py."""
    topology = request.topology
    sizes = {name: size for name, size in dataclasses.asdict(layout.mesh).items() if size != 1 or name == "data"}
    why = "the fastest that fits by estimate" if layout.fits else "the one that needs the least memory"
    rows = [("mesh", f"{describe(sizes)}, {why}; --mesh.* flags give another")]
    flags = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items())
    fewest = fewest_chips(request.config, topology, request.args.weights)
    where = "" if layout.topology == topology else f", on {layout.topology.name}"
    rows.append(
        (
            named("sample"),
            f"{flags} gives this mesh{where}; without these flags it uses {tables.devices_text(fewest, topology)}",
        )
    )
    return rows


def _search(request: Request, console: Console, before: Rows, outputs: Outputs) -> int:
    """Compile the most promising ways to run the step, rank them, and tell how good the estimates were."""
    config, topology, args = request.config, request.topology, request.args
    length, epoch, objective = _length(config, args.tokens)
    search = Search.begin(config, topology)
    console.say([
        *before,
        ("search", f"{len(search.possible)} ways to run the step, {search.fitting} may fit by the estimate; at most {args.compiles} are compiled, "
         "a minute or more each, and each corrects the estimate of the others"),
    ])  # fmt: skip
    found = []
    for compiled in search.run(
        args.compiles, lambda c: _tried(c.flags(config), c.config, topology, objective, console)
    ):
        found.append(compiled)
        console.print(row_text(compiled, config))
    best = ranked(found)
    fits = bool(best) and best[0].plan.fits
    other = None if fits else smallest_slice(config, topology, ratio(found))
    advice = [] if other is None else [other]
    if args.json:
        more = {"advice": [a.summary() for a in advice], "errors": errors_summary(found)}
        entries = [
            summaries.summary(c.plan, length, epoch) | {"flags": c.candidate.flags(config)} | estimates_of(c) | more
            for c in best
        ]
        print(json.dumps(entries), flush=True)
    else:
        print("\nranked:")
        for compiled in best:
            print(row_text(compiled, config))
        print(tables.table(error_rows(found)), flush=True)
        if not fits:
            print(tables.table(tables.advice_rows(topology, advice)), flush=True)
    if written := outputs.draw(lambda path: draw_search(search, found, path)):
        console.say(written)
    return FITS if fits else DOES_NOT_FIT


def _tried(flags: str, config: Config, topology: Topology, kind: Kind, console: Console) -> Plan | None:
    """Return a plan of settings that the user did not ask for, or None if the compiler fails."""
    with contextlib.suppress(UserError):
        return _compiled(config, topology, kind, console, [("", f"trying {flags}")])
    return None


def _compiled(config: Config, topology: Topology, kind: Kind, console: Console, before: Rows) -> Plan:
    """Compile a step in a separate process and return its plan. ``before`` is printed after all checks.

    Raises UserError if the step cannot be planned, or if the compiler fails.
    """

    def make(begun: Callable[[], None]) -> Plan:
        return plan_step(config, topology, kind, begun)

    try:
        with console.working() as beat:
            return run_apart(make, lambda: console.say(before) if before else None, beat)
    except CompilerError as error:
        raise UserError(
            f"plan: expected a step that the {'GPU' if topology.is_gpu else 'TPU'} compiler accepts, found that it fails: "
            f"{str(error)[:300]}; change [mesh] or the model's sizes, or take another slice"
        ) from None
