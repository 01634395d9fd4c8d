"""The command line of train.py: which of two settings counts, and what fine-tuning begins with."""

import dataclasses
from pathlib import Path

import pytest

from llama_jax.config import Config, to_toml
from llama_jax.errors import UserError
from llama_jax.training.command import read_command
from tests import inside
from tests.commands import SMALL_MODEL, STORIES


def test_without_arguments_the_stories_configuration_supplies_all() -> None:
    config, notes = read_command([])
    assert config.train.save_dir == "runs/tiny" and config.train.max_steps == 700 and notes == []


@pytest.mark.parametrize("argv", [["my.txt"], ["--data.filepath", "my.txt"], ["--train.max-steps", "3", "my.txt"], ["my.txt", "--data.filepath=my.txt"]])  # fmt: skip
def test_a_text_may_be_given_by_itself(argv: list[str]) -> None:
    config, notes = read_command(argv)
    assert config.data.filepath == "my.txt" and notes == []


def test_a_start_that_decays_another_run_has_its_settings_but_for_its_folders_and_its_end(tmp_path: Path) -> None:
    train = dataclasses.replace(
        Config().train,
        schedule="wsd",
        lr=7e-4,
        max_steps=1000,
        save_dir="runs/a",
        checkpoint_dir="gs://b/a",
        resume_step=5,
    )
    (tmp_path / "config.toml").write_text(to_toml(dataclasses.replace(Config(), train=train)))
    argv = ["--train.decay-run", str(tmp_path), "--train.decay-from", "800"]
    config, notes = read_command([*argv, "--train.save-dir", "runs/b", "--train.min-lr-ratio", "0"])
    own = {"max_steps": None, "save_dir": "runs/b", "checkpoint_dir": "", "resume_step": 0, "min_lr_ratio": 0.0}
    assert config.train == dataclasses.replace(train, **own, decay_run=str(tmp_path), decay_from=800)  # type: ignore[arg-type]
    assert notes == [f"settings of {tmp_path / 'config.toml'}, but for where it ends; flags override them"]
    assert read_command([*argv, "--train.save-dir=b", "--train.max-steps=900"])[0].train.max_steps == 900
    with pytest.raises(
        UserError, match=r"^train\.save_dir: expected a new folder .* found none; give --train\.save-dir"
    ):
        read_command(argv)
    with pytest.raises(
        UserError, match=r"^train\.decay_run: expected a run folder, with config\.toml, found none in nowhere"
    ):
        read_command(["--train.decay-run", "nowhere", *argv[2:]])


def test_two_texts_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.filepath: expected one text, found a\.txt and b\.txt"):
        read_command(["a.txt", "--data.filepath", "b.txt"])
    with pytest.raises(UserError, match=r"b\.txt"):
        read_command(["a.txt", "b.txt"])


@pytest.mark.parametrize(
    "flag", ["--data.filepath", "--data.eval-filepath", "--data.tokenizer-model-path", "--train.init-from"]
)
def test_a_path_without_a_value_is_not_the_built_in_stories_or_none(flag: str, tmp_path: Path) -> None:
    name = flag[2:].replace("-", "_")
    for argv in ([flag, ""], [f"{flag}="]):
        with pytest.raises(UserError, match=f"{name}: expected a path, found an empty text"):
            read_command(argv, check=False)
    with pytest.raises(UserError, match=r"data\.filepath: expected a path, found an empty text"):
        read_command([""])
    section, key = name.split(".")
    (tmp_path / "a.toml").write_text(f'[{section}]\n{key} = "there"\n')
    config, _ = read_command(["--config", str(tmp_path / "a.toml"), flag, ""], check=False)
    assert getattr(getattr(config, section), key) == "", "what the file says is taken away"


def test_a_flag_beats_a_key_of_the_file_that_decides_the_same(tmp_path: Path) -> None:
    config, notes = read_command(["--train.n-epochs", "3"])
    assert config.train.max_steps is None and config.train.n_epochs == 3
    assert notes == ["train.max_steps 700 of the file is not used, as --train.n_epochs 3 decides the same"]
    file = dataclasses.replace(
        Config(), data=dataclasses.replace(Config().data, filepath="a.txt", tokenizer_model_path="m")
    )
    (tmp_path / "c.toml").write_text(to_toml(file))
    config, notes = read_command(["--config", str(tmp_path / "c.toml"), "--data.vocab-size=300"])
    assert config.data.tokenizer_model_path == "" and "data.tokenizer_model_path m of the file" in notes[0]
    config, notes = read_command(["--config", str(tmp_path / "c.toml"), "--data.stories=300"])
    assert config.data.filepath == "" and "data.filepath a.txt of the file" in notes[0]


def test_of_two_flags_that_decide_the_same_the_one_that_does_not_count_is_told() -> None:
    config, notes = read_command(["--train.n-epochs", "3", "--train.max-steps=5"])
    assert config.train.max_steps == 5 and "train.n_epochs 3 is not used" in notes[0]
    argv = ["--train.schedule", "wsd", "--train.n-epochs", "3", "--train.decay-from", "400"]
    assert "train.n_epochs 3 is not used, as train.decay_from 400 decides the same" in read_command(argv)[1]


def test_a_run_whose_rate_does_not_stay_is_not_told_to_change_its_schedule(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[train]\nschedule = "linear"\n')
    argv = [f"--train.decay-run={tmp_path}", "--train.decay-from=400", "--train.save-dir=new"]
    with pytest.raises(
        UserError, match=r"^train\.decay_run: expected a run with train\.schedule wsd, found linear in "
    ):
        read_command(argv)


def test_what_a_recipe_expects_of_its_text_is_not_expected_of_another_one(tmp_path: Path) -> None:
    curve = "[expected]\ntokens = [10, 20]\nlow = [1.0, 1.0]\nbits_per_byte = [2.0, 2.0]\nhigh = [3.0, 3.0]\n"
    (tmp_path / "my.toml").write_text('[data]\nfilepath = "my.txt"\n' + curve)
    argv = ["--config", str(tmp_path / "my.toml")]
    assert read_command(argv)[0].expected.tokens == (10, 20) == read_command([*argv, "my.txt"])[0].expected.tokens
    for other in (["--data.filepath", "other.txt"], ["other.txt"], ["--data.eval-filepath", "other.txt"]):
        config, notes = read_command([*argv, *other])
        assert config.expected.tokens == () and "no loss is expected: [expected] of the file is for" in notes[-1]


def test_the_built_in_conversations_give_way_to_a_text_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[data]\nchats = 50\n")
    config, notes = read_command(["--config", str(tmp_path / "c.toml"), "my.jsonl"])
    assert (config.data.chats, config.data.filepath) == (0, "my.jsonl")
    assert notes == ["data.chats 50 of the file is not used, as --data.filepath my.jsonl decides the same"]
    config, notes = read_command(["--config", str(tmp_path / "c.toml"), "--data.stories=300"])
    assert (config.data.chats, config.data.stories) == (0, 300) and "data.chats 50 of the file is not used" in notes[0]
    with pytest.raises(
        UserError, match=r"^data\.filepath: expected none beside data\.chats, .* found a\.jsonl; leave one"
    ):
        read_command(["--data.filepath=a.jsonl", "--data.chats=5"])


@pytest.mark.parametrize(
    ("base", "ends"),
    [
        (
            "runs/tiny",
            r"^train\.init_from: expected a model, found nothing in runs/tiny; train it first: python \S*train\.py$",
        ),
        ("runs/shakespeare", r"; train it first: python \S*train\.py --config shakespeare$"),
        ("runs/mine", "runs/mine: expected a checkpoint folder, found nothing"),
        ("tiny", "tiny: expected a checkpoint folder, found nothing"),
    ],
)
def test_a_base_that_a_configuration_would_make_is_told_how_to_make(
    base: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=ends):
        read_command(["--train.init-from", base])


def test_fine_tuning_has_settings_of_its_own(tmp_path: Path) -> None:
    small = [*SMALL_MODEL, *STORIES, "--train.max-steps=2", "--train.eval-iters=1", "--train.batch-size=2"]
    done = inside.run(["train.py", *small, "--train.save-dir=base"], tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "my.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 100)
    done = inside.run(["train.py", "my.txt", "--train.init-from=base", "--train.max-steps=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "settings of finetune: learning rate 2e-05, warm-up 20 steps, 2 steps, weight decay 0.1, as the LLaMA 2 pa"
        in done.stdout
    )
    assert (tmp_path / "runs" / "finetune" / "config.toml").exists()
    again = inside.run(
        ["train.py", "my.txt", "--train.init-from=base", "--train.max-steps=3", "--train.lr=1e-4"], tmp_path
    )
    assert again.returncode == 0 and "train.lr 2e-05 -> 0.0001" in again.stdout, again.stderr
    assert "but for the given lr" in again.stdout
    # A file's values count, and a learning rate that it lacks is told; adapters have rates of their own.
    (tmp_path / "own.toml").write_text("[train]\nn_epochs = 3\n")
    own = [
        "--config",
        str(tmp_path / "own.toml"),
        f"--train.init-from={tmp_path / 'base'}",
        "--train.save-dir",
        str(tmp_path / "x"),
    ]
    config, notes = read_command(own)
    assert (config.train.lr, config.train.n_epochs) == (3e-4, 3)
    assert "it has no learning rate, so that this is the one of pretraining" in notes[-1]
    config, notes = read_command([*own, "--lora.rank=2", "--train.weight-decay=0.2"])
    assert (config.train.lr, config.train.n_epochs, config.train.weight_decay) == (2e-4, 3, 0.2)
    assert "settings of lora: learning rate 0.0002" in notes[-1] and "the given n_epochs, weight_decay" in notes[-1]
    # Nothing is said of the file of pretraining, which is not read, and a conflict of two flags is told once.
    tuned = [f"--train.init-from={tmp_path / 'base'}", "--lora.rank=2", "--train.n-epochs=3"]
    assert [note.partition(":")[0] for note in read_command(tuned)[1]] == ["settings of lora"]
    (conflict, _) = read_command([*tuned, "--train.max-steps=5"])[1]
    assert conflict == "train.n_epochs 3 is not used, as train.max_steps 5 decides the same"
