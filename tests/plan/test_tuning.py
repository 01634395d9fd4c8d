"""Plans of tuning on conversations and preferences: epochs as training counts them, and the compiled step of DPO."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import Config, DataArgs, MeshArgs, ModelArgs, TrainArgs, to_toml
from llama_jax.data.conversations import Pairs, open_chats
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.arguments import read_request
from llama_jax.plan.cost import Cost, Schedule
from llama_jax.plan.estimate import training_bytes
from llama_jax.plan.extras import reference_cost, reference_rows
from llama_jax.plan.settings import Epoch, Found, epoch_of, run_tokens
from llama_jax.plan.summaries import summary
from llama_jax.plan.tables import training_text
from llama_jax.plan.topology import Topology
from llama_jax.plan.tuning_data import with_masks
from llama_jax.tokenizer import Tokenizer
from llama_jax.training import loop, samples
from llama_jax.training.command import read_command
from llama_jax.training.objective import Dpo, NextToken, make_objective
from tests import forked
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """Preferences, conversations in two files, and tokens of a text."""
    folder = tmp_path_factory.mktemp("tuning")
    pairs = [
        {"prompt": "a " * (i % 4 + 1), "chosen": "b " * (i % 5 + 1), "rejected": "c " * (i % 3 + 1)} for i in range(50)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, count in (("one.jsonl", 40), ("two.jsonl", 30)):
        chats = [{"prompt": "a " * (i % 6), "completion": "b " * (i % 7 + 1)} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "text.txt").write_text("The fox went to the river.\n" * 200)
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    command = ["-m", "llama_jax.data", "prepare", "--filepath", "text.txt", "--tokenizer-model-path", "tokenizer.model"]
    done = forked.run([*command, "--output", "tokens", "--workers", "1"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    monkeypatch.setattr(samples, "show", lambda *_, **__: 0)


def planned(flags: list[str]) -> Config:
    return read_request(["--topology", "v5e:2x2", *flags]).config


def steps_of(flags: list[str], run: Path) -> int:
    """The steps that training takes."""
    config, _ = read_command([*flags, "--train.save-dir", str(run), "--train.eval-interval", "1000"])
    with contextlib.redirect_stdout(io.StringIO()):
        found = loop.train(config)
    return int(json.loads(found.metrics_path.read_text().splitlines()[-1])["step"])


def tuning(place: Path, *flags: str) -> list[str]:
    return ["--train.init-from", str(place / "runs" / "tiny"), "--data.chat-template", "llama2", *flags]


def test_epochs_of_preferences_are_as_many_pairs_and_steps_as_training_takes(
    place: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--train.objective", "dpo", "--train.batch-size", "2", "--train.n-epochs", "2", "--lora.rank", "2"]
    flags = tuning(place, "--data.filepath", str(folder / "pairs.jsonl"), "--model.max-seq-len", "96", *flags)
    config = planned(flags)
    length, steps = config.model.max_seq_len, steps_of(flags, tmp_path / "run")
    epoch, _ = epoch_of(config)
    trained, held_out = (getattr(open_chats(tmp_path / "run" / "tokens"), split) for split in ("train", "eval"))
    assert epoch is not None and isinstance(trained, Pairs)
    assert (epoch.records, epoch.rows) == (trained.records, trained.sequences(length)) and 0 < trained.records < 50
    assert epoch.most_pairs == max(trained.most_pairs(length), held_out.most_pairs(length)) > 1
    value, source = run_tokens(config)
    assert value == steps * 2 * 2 * length and steps == epoch.steps(config, 2) == -(-2 * epoch.rows // 2)
    assert f"{trained.records} pairs of answers" in source and f"{steps} steps" in source
    assert run_tokens(replace(config, train=replace(config.train, max_steps=7))).value == 7 * 2 * 2 * length


def test_a_mixture_of_conversations_from_a_checkpoint_is_counted_as_training_does(
    place: Path, folder: Path, tmp_path: Path
) -> None:
    mixture = ["--data.mixture", str(folder / "one.jsonl"), "0.5", str(folder / "two.jsonl"), "0.5"]
    flags = tuning(place, *mixture, "--train.batch-size", "2", "--train.n-epochs", "1")
    config, _ = with_masks(planned(flags))
    assert config.data.document_mask and config.train.n_epochs == 1
    value, source = run_tokens(config)
    steps = steps_of(flags, tmp_path / "run")
    assert value == steps * 2 * config.model.max_seq_len and f"{steps} steps" in source
    assert "one.jsonl, " in source and "conversations to train on" in source


def test_a_mixture_of_conversations_and_prepared_tokens_is_counted_by_their_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    mixture = {str(folder / "tokens"): 0.5, str(folder / "one.jsonl"): 0.5}
    data = DataArgs(mixture=mixture, chat_template="llama2")
    train = TrainArgs(batch_size=2, n_epochs=1, eval_interval=1000, save_dir=str(tmp_path / "run"))
    config = Config(ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=64), data, train)
    with contextlib.redirect_stdout(io.StringIO()):
        run = loop.train(config)
    steps = json.loads(run.metrics_path.read_text().splitlines()[-1])["step"]
    assert run_tokens(config).value == steps * 2 * 64
    unprepared = replace(config, data=replace(data, mixture={str(folder / "text.txt"): 1.0, **mixture}))
    value, why = run_tokens(unprepared)
    assert value is None and "--tokens" in why


def test_what_training_would_refuse_as_preferences_plan_refuses(place: Path, folder: Path) -> None:
    for name in ("one.jsonl", "text.txt", "tokens"):
        config = planned(tuning(place, "--train.objective", "dpo", "--data.filepath", str(folder / name)))
        with pytest.raises(UserError, match=r"data\.filepath: expected preferences"):
            run_tokens(config)
    missing = planned(tuning(place, "--train.objective", "dpo", "--data.filepath", "nowhere.jsonl"))
    assert run_tokens(missing).value is None


def test_without_a_configuration_the_settings_are_those_of_training(place: Path, folder: Path) -> None:
    for more in (
        ["--train.objective", "dpo", "--lora.rank", "2"],
        ["--train.objective", "dpo"],
        ["--lora.rank", "2"],
        [],
    ):
        flags = tuning(place, "--data.filepath", str(folder / "pairs.jsonl"), *more)
        trained, _ = read_command(flags)
        assert planned(flags).train == replace(trained.train, save_dir="")
    with_file = tuning(place, "--config", str(ROOT / "configs" / "tiny.toml"), "--lora.rank", "2")
    trained, _ = read_command(with_file)
    assert planned(with_file).train == replace(trained.train, save_dir=planned(with_file).train.save_dir)


def test_the_objective_has_the_positions_and_pairs_of_training() -> None:
    config = Config(ModelArgs(max_seq_len=64), train=TrainArgs(objective="dpo", dpo_beta=0.3))
    assert make_objective(config, 5) == Dpo(0.3, 0.0, 5, 128)
    assert make_objective(Config()) == NextToken()
    masked, notes = with_masks(config)
    assert masked.data.document_mask and "answer" in notes[0]
    large = Config(ModelArgs(dim=1024, n_layers=12, n_heads=16, vocab_size=32000), train=TrainArgs(batch_size=8))
    large = replace(large, mesh=MeshArgs(data=1))
    twice = training_bytes(replace(large, train=replace(large.train, objective="dpo"))) / training_bytes(large)
    assert 1.3 < twice < 2


TOPOLOGY = Topology.parse("v5e:2x2")
DPO = Config(ModelArgs(vocab_size=512, max_seq_len=1024), train=TrainArgs(batch_size=8, objective="dpo"))
PLAN = Plan(
    DPO, TOPOLOGY, {"data": 4}, "bfloat16", "splash", 1 << 30, {"parameters": 1 << 30}, Schedule(Cost(matrix=0.25), TOPOLOGY.chip),
    "", 1.0, objective=make_objective(DPO),
)  # fmt: skip


def test_an_epoch_of_preferences_is_told_with_the_pass_before_it() -> None:
    epoch = Epoch(rows=20, records=70, most_pairs=5, source="pairs.jsonl")
    found = summary(PLAN, Found(3 * 8 * 2048, "an epoch"), epoch)
    assert found["tokens_per_step"] == 8 * 2048 and found["steps"] == 3 and found["objective"] == "dpo"
    assert found["epoch"] == {"pairs": 70, "sequences": 20, "steps": 3, "seconds": 0.75}
    text = training_text(PLAN, Found(3 * 8 * 2048, "an epoch"))
    assert "of 2,048 a sequence" in text and "two answers of 1,024 positions" in text
    first = replace(PLAN, schedule=Schedule(Cost(matrix=0.125), TOPOLOGY.chip))
    cost = reference_cost(PLAN, first, epoch)
    assert cost == {"rows": 8, "seconds_of_rows": 0.125, "sequences": 20, "seconds": 3 * 0.125}
    told = "\n".join(text for _, text in reference_rows(PLAN, cost))
    assert "before the first step" in told and "0.38 s for 20 sequences" in told and "125 ms for 8" in told
    short = replace(PLAN, config=replace(DPO, train=replace(DPO.train, max_steps=2)))
    assert reference_cost(short, first, epoch)["sequences"] == 16  # type: ignore[index]
    assert "not known" in reference_rows(PLAN, reference_cost(PLAN, first, None))[1][1]
    assert reference_cost(PLAN, None, epoch) is None and "not compiled" in reference_rows(PLAN, None)[0][1]


def compiled(folder: Path, *flags: str, **train: Any) -> Any:
    model = ModelArgs(dim=128, n_layers=1, n_heads=1, vocab_size=128, multiple_of=128, max_seq_len=128)
    args = TrainArgs(batch_size=4, remat="attention", max_steps=10, **train)
    (folder / "c.toml").write_text(to_toml(Config(model, train=args, mesh=MeshArgs(data=1, fsdp=4))))
    argv = [
        "-m",
        "llama_jax.plan",
        "--config",
        str(folder / "c.toml"),
        "--output=",
        "--topology=v5e:2x2",
        "--json",
        *flags,
    ]
    done = forked.run(argv, folder, environment=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"said": done.stderr}


@needs_libtpu
@pytest.mark.parametrize("flags", [["--lora.rank=8"], pytest.param([], marks=pytest.mark.slow)])
def test_the_step_of_dpo_is_compiled_with_both_answers_and_the_reference_before_it(
    tmp_path: Path, flags: list[str]
) -> None:
    found = compiled(tmp_path, *flags, objective="dpo")
    assert found["fits"] and found["tokens_per_step"] == 4 * 2 * 128 and found["objective"] == "dpo"
    assert found["document_mask"] and "document_mask_cost" not in found
    assert 0 < found["reference"]["seconds_of_rows"] < found["step_seconds"]
    assert found["reference"]["sequences"] is None and "before the first step" in found["said"]
