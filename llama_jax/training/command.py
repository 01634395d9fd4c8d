"""The command line of train.py: flags override a TOML file, which overrides the defaults."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from llama_jax.cli.configurations import check_no_config, find_config, names, shipped, stated_keys
from llama_jax.cli.flags import given_flags, parse_flags, take_option, texts_given_twice
from llama_jax.config import Config, DataArgs, TrainArgs, load_toml
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import is_address
from llama_jax.training.deciding import decide, get, with_value

# The shipped configurations that give the settings of a run without --config, and of one that starts from a checkpoint.
# The third one trains adapters, the last two train on preferences, without and with adapters.
DEFAULT, FINE_TUNING, ADAPTERS, DPO, DPO_ADAPTERS = "tiny", "finetune", "lora", "dpo", "dpo-lora"
# Where the rates of some come from, and the settings that these are.
ORIGINS = {
    FINE_TUNING: ", as the LLaMA 2 paper (section 3.1) fine-tunes, in batches of 64",
    ADAPTERS: ", as the QLoRA paper (section 4.1)",
}
RATES = ("lr", "min_lr_ratio", "warmup_steps", "n_epochs", "weight_decay", "beta2", "eps")
# Settings that a start which decays another run does not take over from it.
NOT_CONTINUED = ("save_dir", "checkpoint_dir", "max_steps", "minutes", "resume_step", "decay_from", "profile_steps")
# Without them, a run takes something else: the built-in stories, the end of the text, a new vocabulary, a new model.
PATHS = ("data.filepath", "data.eval_filepath", "data.tokenizer_model_path", "train.init_from", "train.decay_run")


@dataclasses.dataclass(frozen=True)
class Command(Config):
    """The arguments of train.py."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Text to train on: a file, a folder or a quoted glob. The same as --data.filepath."""


def read_command(argv: Sequence[str], check: bool = True) -> tuple[Config, list[str]]:
    """Return the configuration of a command line, and a note for each conflict between two settings.

    Without --config, defaults come from tiny.toml, from finetune.toml with --train.init-from, from lora.toml with
    --lora.rank as well, and from dpo.toml or dpo-lora.toml with --train.objective dpo. With --train.decay-run they are
    that run's. ``check`` False leaves the checks of values to the caller, who changes some first. Raises UserError if
    the command line is wrong.
    """
    named, rest = take_option(list(argv), "--config")
    source, found = (shipped(DEFAULT), []) if named is None else find_config(named)
    file = load_toml(source)
    config, notes = _parse(rest, file)
    if config.train.decay_run and named is None:
        return _continuation(rest, config.train.decay_run, config.train.save_dir)
    if config.train.init_from:
        from llama_jax.training.opening import starting_model

        tuning, stated = shipped(tuning_settings(config)), given_flags(rest)
        if tuned := named is None:
            source = tuning
            file = load_toml(source)
        else:
            stated |= stated_keys(source)
            if tuned := is_tuning(config):
                file = with_tuning_rates(file, load_toml(tuning), stated)
        config, notes = _parse(rest, file)
        notes.append(_tuning_note(config, stated, tuning.stem, source.stem, tuned))
        if unused := "data.vocab_size" in stated:
            notes.append(
                f"data.vocab_size {config.data.vocab_size:,} is not used, as the tokenizer is that of train.init_from {config.train.init_from}"
            )
        train = dataclasses.replace(config.train, save_dir=config.train.save_dir or f"runs/{source.stem}")
        # The model's shape comes from the checkpoint. Flags may only change what leaves its parameters as they are.
        _check_base(train.init_from)
        model = starting_model(train, config.lora)
        config, _ = _parse(rest, dataclasses.replace(file, model=model))
        config = with_value(config, "data.vocab_size", DataArgs.vocab_size) if unused else config
    train = dataclasses.replace(config.train, save_dir=config.train.save_dir or f"runs/{source.stem}")
    config = dataclasses.replace(config, train=train)
    if check:
        config.check()
    return config, found + notes


def _continuation(argv: list[str], run: str, place: str) -> tuple[Config, list[str]]:
    """Return the configuration of a start that decays the run in the folder ``run`` in another, ``place``, and notes.

    Its settings are the run's, but for its own folders and its number of steps. A decay that has begun goes on with the
    settings with which it began, as the run itself may go on with others. Raises UserError if there is no such run.
    """
    begun, path = (Path(folder).expanduser() / "config.toml" for folder in (place, run))
    if place and begun.is_file() and (of := load_toml(begun).train.decay_run):
        path = begun if os.path.realpath(of) == os.path.realpath(run) else path
    if not path.is_file():
        raise UserError(
            f"train.decay_run: expected a run folder, with {path.name}, found none in {run}; name the --train.save-dir of the run"
        )
    file = load_toml(path)
    own = {name: getattr(TrainArgs, name) for name in NOT_CONTINUED}
    config, notes = _parse(argv, dataclasses.replace(file, train=dataclasses.replace(file.train, **own)))
    if not config.train.save_dir:
        raise UserError(
            f"train.save_dir: expected a new folder in which the run in {run} is continued, found none; give --train.save-dir"
        )
    if file.train.schedule != "wsd":  # before the checks, whose advice would be to change it
        raise UserError(
            f"train.decay_run: expected a run with train.schedule wsd, found {file.train.schedule} in {run}; name one with wsd"
        )
    config.check()
    return config, [f"settings of {path}, but for where it ends; flags override them", *notes]


def with_tuning_rates(file: Config, tuning: Config, stated: set[str]) -> Config:
    """Return the configuration of a file with the rates of ``tuning`` where neither the file nor a flag has its own."""
    rates = {name: getattr(tuning.train, name) for name in RATES if f"train.{name}" not in stated}
    return dataclasses.replace(file, train=dataclasses.replace(file.train, **rates))


def _tuning_note(config: Config, stated: set[str], tuning: str, source: str, tuned: bool) -> str:
    """Return a line that says which rates a fine-tuning run has, and why. ``tuned``: they are those of ``tuning``."""
    train, own = config.train, [name for name in RATES if f"train.{name}" in stated]
    length = f"{train.max_steps:,} steps" if train.max_steps else f"{train.n_epochs} epoch{'s'[: train.n_epochs != 1]}"
    rates = f"learning rate {train.lr:g}, warm-up {train.warmup_steps:,} steps, {length}, weight decay {train.weight_decay:g}"
    if tuned:
        given = f", but for the given {', '.join(own)}" if own else ""
        return f"settings of {tuning}: {rates}{ORIGINS.get(tuning, '')}{given}; flags override them"
    if "lr" in own:
        return f"settings of {source}: {rates}"
    return (
        f"settings of {source}: {rates}; it has no learning rate, so that this is the one of pretraining; the LLaMA 2 paper "
        "fine-tunes with 2e-05 for 2 epochs (--train.lr 2e-5 --train.n-epochs 2)"
    )


def is_tuning(config: Config) -> bool:
    """Return whether a run is fine-tuning by what it trains: adapters, on preferences, or on conversations.

    A text may as well be more of the text of pretraining.
    """
    if config.lora.rank or config.train.objective == "dpo":
        return True
    with contextlib.suppress(UserError, OSError):  # training looks for the text again, and says what is wrong
        from llama_jax.data.finding import find_text, is_chats

        return (
            bool(config.data.filepath)
            and not is_address(config.data.filepath)
            and is_chats(find_text(config.data, Path()))
        )
    return False


def tuning_settings(config: Config) -> str:
    """Return the name of the shipped configuration for what a run trains."""
    if config.train.objective == "dpo":
        return DPO_ADAPTERS if config.lora.rank else DPO
    return ADAPTERS if config.lora.rank else FINE_TUNING


def _check_base(base: str) -> None:
    """Raise UserError if ``base`` is where a configuration of the package leaves a model, and none is there."""
    path = Path(base)
    if path != Path("runs", path.name) or path.name not in names() or path.exists():
        return
    config = "" if path.name == DEFAULT else f" --config {path.name}"
    raise UserError(
        f"train.init_from: expected a model, found nothing in {base}; train it first: {typed('train')}{config}"
    )


def _parse(argv: list[str], file: Config) -> tuple[Config, list[str]]:
    sections = {field.name: getattr(file, field.name) for field in dataclasses.fields(Config)}
    description = (
        "Pretrain a LLaMA 2 model on the built-in stories or on your text, or fine-tune one.\n\n--config gives settings; flags override them. It is "
        "a TOML file, or the name of a configuration in the package."
    )
    command = parse_flags(Command, argv, Command(**sections), typed("train"), description)
    config = Config(**{name: getattr(command, name) for name in sections})
    given = given_flags(argv)
    texts = list(command.text)
    if texts and "data.filepath" in given and texts != [config.data.filepath]:
        texts.append(config.data.filepath)
    if len(texts) > 1:
        found = " and ".join(texts) if len(texts) < 4 else f"{texts[0]}, {texts[1]} and {len(texts) - 2} others"
        raise UserError(f"data.filepath: expected one text, found {found}; name their folder, or quote the glob")
    if texts:
        config = with_value(config, "data.filepath", texts[0])
        given.add("data.filepath")
    if "data.filepath" in given and not config.data.as_text:
        check_no_config(config.data.filepath)
    for name in PATHS:
        # An empty path may take one of the file away. Else it is a shell's variable without a value.
        if name in given and not get(config, name) and not get(file, name):
            raise UserError(f"{name}: expected a path, found an empty text; give a path, or leave the flag out")
    config, notes = _without_expectation(*decide(config, given), file)
    return config, [*notes, *filter(None, [texts_given_twice(argv)])]


def _without_expectation(config: Config, notes: list[str], file: Config) -> tuple[Config, list[str]]:
    """Return the configuration without the expectation of its file, and a note, if it reads another text than that."""
    for name in ("data.filepath", "data.eval_filepath") if file.expected.tokens else ():
        was, found = get(file, name), get(config, name)
        if found != was and config.expected == file.expected:
            note = (
                f"no loss is expected: [expected] of the file is for {name} {was or 'none'}, and this run has {found or 'none'}; make a new "
                "recipe for this text"
            )
            return dataclasses.replace(config, expected=Config().expected), [*notes, note]
    return config, notes
