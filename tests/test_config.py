"""Configuration: what TOML and flags accept, and how they refuse."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.cli.flags import parse_flags
from llama_jax.config import (
    Config,
    DataArgs,
    DistributedArgs,
    MeshArgs,
    ModelArgs,
    SampleArgs,
    TrainArgs,
    from_dict,
    load_toml,
    to_toml,
)
from llama_jax.errors import UserError
from llama_jax.expected_args import ExpectedArgs
from llama_jax.lora_args import MATRICES, LoraArgs
from llama_jax.train_args import Remat

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {section.name: type(section.default) for section in dataclasses.fields(Config)}
REFUSED_REMAT = ("some", "dots:", "dots:0", "dots:x", "w1:3", "w1,", "w1,full", "", "dots:1:2")
FIELDS = [(name, field.name) for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def flags(*argv: str, default: Config = Config()) -> Config:
    return parse_flags(Config, argv, default, "train.py", "Train.")


def toml(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call: typing.Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "key", "expected", "found"),
    [
        ("[model]\nn_layer = 4", "model.n_layer", "n_layers", "n_layer"),
        ("[modle]\ndim = 4", "modle", "model", "modle"),
        ("lr = 4", "lr", "train", "lr"),
        ("[train]\nlr = 'fast'", "train.lr", "float", "'fast'"),
        ("[model]\nn_layers = 4.0", "model.n_layers", "int", "4.0"),
        ("[model]\nn_layers = true", "model.n_layers", "int", "True"),
        ("[model]\nn_kv_heads = 'all'", "model.n_kv_heads", "int or nothing", "'all'"),
        ("[data]\nfilepath = 3", "data.filepath", "str", "3"),
        ("[data]\nfilepath = ['a', 'b']", "data.filepath", "str", "['a', 'b']"),
        ("[train]\nremat = 3", "train.remat", "str", "3"),
        ("model = 7", "model", "a table [model]", "7"),
        ("[train\nlr = 3", "c.toml", "TOML", "line 1"),
    ],
)
def test_a_bad_toml_file_is_refused_in_one_line_with_file_key_expected_and_found(tmp_path, text, key, expected, found):
    path = toml(tmp_path, text)
    message = refusal(lambda: load_toml(path))
    assert message.startswith(f"{path}: ")
    assert key in message and "expected" in message and expected in message and found in message


def test_a_toml_file_that_is_missing_a_folder_or_not_text_is_refused(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.toml", ".", "bytes.toml"):
        path = tmp_path / name
        message = refusal(lambda path=path: load_toml(path))
        assert str(path) in message and "expected" in message and "found" in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model.n-layer", "4"], ["--model.n-layer", "perhaps you meant --model.n-layers"]),
        (["--model.n-layers", "x"], ["--model.n-layers", "expected a whole number", "'x'"]),
        (["--model.n_layers", "4.5"], ["--model.n-layers", "expected a whole number", "'4.5'"]),
        (["--train.lr", "abc"], ["--train.lr", "expected a number", "'abc'"]),
        (["--train.attention", "some"], ["--train.attention", "one of 'auto', 'xla'", "'some'"]),
        (["--train.lr"], ["--train.lr", "expected a value"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_bad_flag_is_refused_in_one_line_with_flag_expected_and_found(argv, parts):
    message = refusal(lambda: flags(*argv))
    assert all(part in message for part in parts), message
    assert "train.py --help" in message
    assert not set("╭│╰─") & set(message)


@pytest.mark.parametrize(
    ("section", "key", "found"),
    [
        (ModelArgs(dim=128, n_heads=7), "model.n_heads", "7"),
        (ModelArgs(dim=60, n_heads=12), "model.n_heads", "12 heads of 5"),
        (ModelArgs(n_kv_heads=5), "model.n_kv_heads", "5"),
        *((TrainArgs(remat=text), "train.remat", repr(text)) for text in REFUSED_REMAT),
        (Config(train=TrainArgs(remat="dots:40")), "train.remat", "40"),
        (ModelArgs(n_kv_heads=0), "model.n_kv_heads", "0"),
        (ModelArgs(n_kv_heads=-3), "model.n_kv_heads", "-3"),
        (ModelArgs(dim=0), "model.dim", "0"),
        (ModelArgs(n_layers=-1), "model.n_layers", "-1"),
        (ModelArgs(n_heads=0), "model.n_heads", "0"),
        (ModelArgs(max_seq_len=0), "model.max_seq_len", "0"),
        (ModelArgs(multiple_of=0), "model.multiple_of", "0"),
        (ModelArgs(vocab_size=0), "model.vocab_size", "0"),
        (ModelArgs(norm_eps=float("nan")), "model.norm_eps", "nan"),
        (ModelArgs(norm_eps=float("inf")), "model.norm_eps", "inf"),
        (ModelArgs(rope_theta=float("inf")), "model.rope_theta", "inf"),
        (ModelArgs(ffn_dim_multiplier=float("inf")), "model.ffn_dim_multiplier", "inf"),
        (ModelArgs(ffn_dim_multiplier=-1.0), "model.ffn_dim_multiplier", "-1.0"),
        (ModelArgs(ffn_dim_multiplier=1e-9), "model.ffn_dim_multiplier", "0"),
        (DataArgs(train_size=0.0), "data.train_size", "0.0"),
        (DataArgs(train_size=1.5), "data.train_size", "1.5"),
        (DataArgs(vocab_size=100), "data.vocab_size", "100"),
        (DataArgs(stories=0), "data.stories", "0"),
        (TrainArgs(lr=0.0), "train.lr", "0.0"),
        (TrainArgs(rate_width=0), "train.rate_width", "0"),
        (TrainArgs(rate_width=-128), "train.rate_width", "-128"),
        (TrainArgs(batch_size=0), "train.batch_size", "0"),
        (TrainArgs(batch_size=6, gradient_accumulation_steps=4), "train.gradient_accumulation_steps", "4"),
        (TrainArgs(max_steps=0), "train.max_steps", "0"),
        (TrainArgs(n_epochs=0), "train.n_epochs", "0"),
        (TrainArgs(beta2=1.0), "train.beta2", "1.0"),
        (TrainArgs(min_lr_ratio=2.0), "train.min_lr_ratio", "2.0"),
        (TrainArgs(decay_fraction=0.5), "train.decay_fraction", "train.schedule cosine"),
        (TrainArgs(schedule="wsd", decay_fraction=0.0), "train.decay_fraction", "0.0"),
        (TrainArgs(schedule="wsd", decay_fraction=1.5), "train.decay_fraction", "1.5"),
        (TrainArgs(decay_from=200), "train.decay_from", "train.schedule cosine"),
        (TrainArgs(schedule="linear", decay_from=200), "train.decay_from", "train.schedule linear"),
        (TrainArgs(schedule="wsd", decay_from=99), "train.decay_from", "99"),
        (TrainArgs(schedule="wsd", decay_from=200, hold_lr=True), "train.hold_lr", "both"),
        (TrainArgs(schedule="wsd", decay_from=200, decay_fraction=1.0), "train.max_steps", "none"),
        (TrainArgs(schedule="wsd", decay_from=200, max_steps=200), "train.max_steps", "200"),
        (TrainArgs(schedule="wsd", decay_run="runs/tiny"), "train.decay_run", "none"),
        (TrainArgs(warmup_steps=-1), "train.warmup_steps", "-1"),
        (TrainArgs(grad_clip=-1.0), "train.grad_clip", "-1.0"),
        (TrainArgs(eval_interval=0), "train.eval_interval", "0"),
        (TrainArgs(seed=-1), "train.seed", "-1"),
        (TrainArgs(seed=2**32), "train.seed", str(2**32)),  # more than the shuffle of the batches takes
        (TrainArgs(lr=float("inf")), "train.lr", "inf"),
        (MeshArgs(fsdp=-1), "mesh", "['data', 'fsdp']"),
        (MeshArgs(tensor=0), "mesh.tensor", "0"),
        (SampleArgs(temperature=-0.1), "temperature", "-0.1"),
        (SampleArgs(temperature=float("nan")), "temperature", "nan"),
        (SampleArgs(top_p=0.0), "top_p", "0.0"),
        (SampleArgs(max_new_tokens=0), "max_new_tokens", "0"),
        (SampleArgs(seed=2**63), "seed", str(2**63)),
    ],
)
def test_an_impossible_value_or_combination_is_refused_in_one_line(section, key, found):
    message = refusal(section.check)
    assert message.startswith(f"{key}: expected ")
    assert found in message.split("found ")[1]


def test_a_configuration_checks_all_its_sections():
    Config().check()
    bad = {
        "model": ModelArgs(dim=7),
        "data": DataArgs(train_size=0.0),
        "train": TrainArgs(lr=0.0),
        "mesh": MeshArgs(data=0),
        "distributed": DistributedArgs(timeout_seconds=0),
        "lora": LoraArgs(rank=-1),
        "expected": ExpectedArgs(tokens=(1,)),
    }
    assert bad.keys() == SECTIONS.keys()
    for name, section in bad.items():
        assert name in refusal(dataclasses.replace(Config(), **{name: section}).check)


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
@pytest.mark.parametrize("found", [{"seed": 1}, None, 5, SampleArgs()], ids=lambda x: type(x).__name__)
def test_a_section_that_is_no_settings_is_refused(section, found):
    with pytest.raises(UserError, match=rf"^{section}: expected \w+Args, found .*; make it with"):
        Config(**{section: found}).check()


@pytest.mark.parametrize(
    "kind, name, table, key",
    [
        (SampleArgs, "logit_bias", {5: 1.0}, 6),
        (DataArgs, "mixture", {"a": 1.0}, "b"),
        (ModelArgs, "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "other"),
    ],
)
def test_settings_keep_their_own_table_and_are_hashed(kind, name, table, key):
    given = dict(table)
    made = kind(**{name: given})
    given[key] = 2.0
    assert getattr(made, name) == table
    assert len({made, kind(**{name: dict(table)}), kind()}) == 2


def test_a_text_of_a_mixture_is_named_by_a_text():
    with pytest.raises(UserError, match=r"^data\.mixture: expected str, found 5"):
        DataArgs(mixture={5: 1.0}).check()


@pytest.mark.parametrize(
    "args", [{"rslora": "no"}, {"rslora": 1}, {"base_weights": "int9"}, {"targets": "wq"}, {"targets": None}]
)
def test_settings_of_adapters_of_another_type_are_refused(args):
    (name,) = args
    with pytest.raises(UserError, match=rf"^lora\.{name}: expected .*, found "):
        LoraArgs(rank=4, **args).check()


@pytest.mark.parametrize("path", [None, 5, b"a", "", ["a"]], ids=repr)
def test_what_is_no_path_is_no_configuration(path):
    with pytest.raises(UserError, match=r"^configuration: expected a path, a string or a Path, found "):
        load_toml(path)


def test_hyphen_and_underscore_are_both_taken(tmp_path):
    wanted = Config(model=ModelArgs(n_layers=3), train=TrainArgs(max_steps=7))
    assert flags("--model.n-layers", "3", "--train.max-steps=7") == wanted
    assert flags("--model.n_layers", "3", "--train.max_steps=7") == wanted
    assert load_toml(toml(tmp_path, "[model]\nn-layers = 3\n[train]\nmax-steps = 7")) == wanted
    assert load_toml(toml(tmp_path, "[model]\nn_layers = 3\n[train]\nmax_steps = 7")) == wanted


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = load_toml(toml(tmp_path, "[model]\nn_layers = 3\nn_kv_heads = 2\nn_heads = 4"))
    assert config == Config(model=ModelArgs(n_layers=3, n_kv_heads=2, n_heads=4))
    config = flags("--model.n-layers", "5", "--model.n-kv-heads", "None", default=config)
    assert config == Config(model=ModelArgs(n_layers=5, n_kv_heads=None, n_heads=4))


def test_a_whole_number_stands_for_a_float():
    lr = from_dict(TrainArgs, {"lr": 1}, "x").lr
    assert lr == 1.0 and isinstance(lr, float)
    assert from_dict(ModelArgs, {"ffn_dim_multiplier": 2}, "x") == ModelArgs(ffn_dim_multiplier=2.0)


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        flags("--help")
    assert stop.value.code == 0
    words = " ".join(re.sub("[╭╮╰╯│─]", " ", capsys.readouterr().out).split())
    for section, name in FIELDS:
        flag = f"--{section}.{name.replace('_', '-')}"
        words = words.replace(f"{flag}, --{section}.no-{name.replace('_', '-')}", flag)  # of a bool
        assert f" {flag} " in words, flag
        help_text = words.split(f" {flag} ")[1].split(" --")[0]
        # the type, a sentence of help, and the default
        # (flags that stand in this one's help end what is looked at)
        needed = r"[A-Za-z].*\. .*\((default: |optional)" if name != "eval_tasks" else r"[A-Za-z].*files in JSON lines"
        assert re.search(needed, help_text), f"{flag}: {help_text}"


def test_every_field_can_be_set_by_its_flag():
    for section, name in FIELDS:
        default = getattr(getattr(Config(), section), name)
        hint = str(typing.get_type_hints(SECTIONS[section])[name])
        flag = f"--{section}.{name.replace('_', '-')}"
        if name == "mixture":
            assert flags(flag, "a", "0.7", "b", "3").data.mixture == {"a": 0.7, "b": 3.0}
            continue
        if name == "targets":
            assert flags(flag, "wq", "output").lora.targets == ("wq", "output")
            continue
        if name == "rope_scaling":
            changed = flags(flag, "type", "linear", "factor", "2").model
            assert changed.rope_scaling == {"rope_type": "linear", "factor": 2.0}
            assert flags(flag, "None", default=Config(model=changed)).model.rope_scaling is None
            continue
        if section == "expected" and name != "parameters":
            assert getattr(flags(flag, "1", "2").expected, name) == (1, 2)
            continue
        if name == "eval_tasks":
            assert flags(flag, "a.jsonl", "b").train.eval_tasks == ("a.jsonl", "b")
            continue
        if hint == str(bool):
            assert getattr(getattr(flags(flag), section), name) is not default
            continue
        value = {
            "remat": "dots",
            "attention": "xla",
            "compute_dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "rounding": "compensated",
            "optimizer": "adafactor",
            "schedule": "wsd",
            "moments": "int8",
            "products": "int8",
            "bad_steps": "skip",
            "objective": "dpo",
            "bad_records": "skip",
            "loss_on": "all",
            "too_long": "drop",
            "base_weights": "int8",
        }.get(name, "7" if "int" in hint or "float" in hint else "x")
        config = flags(flag, value)
        changed = getattr(getattr(config, section), name)
        assert changed != default and str(changed).removesuffix(".0") == value


def test_a_flag_may_be_negative():
    assert flags("--model.vocab-size", "-1", "--mesh.data", "1", "--mesh.fsdp", "-1").mesh == MeshArgs(1, -1)


configs = st.builds(
    Config,
    model=st.builds(
        ModelArgs,
        dim=st.integers(),
        n_kv_heads=st.none() | st.integers(),
        ffn_dim_multiplier=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        norm_eps=st.floats(allow_nan=False, allow_infinity=False),
    ),
    data=st.builds(
        DataArgs,
        filepath=st.text(st.characters(exclude_categories=["Cs"])),
        separator=st.sampled_from(["", "\n", "\\n\\n", "\t", '"', "\x7f", "\r\n", "#", "\0"]),
    ),
    train=st.builds(
        TrainArgs,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        max_steps=st.none() | st.integers(),
        remat=st.sampled_from([*typing.get_args(Remat), "dots:20", "w1,w3,attention"]),
    ),
    mesh=st.builds(MeshArgs, data=st.integers()),
    lora=st.builds(
        LoraArgs,
        alpha=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        targets=st.lists(st.sampled_from(MATRICES)).map(tuple),
    ),
    expected=st.builds(
        ExpectedArgs,
        tokens=st.lists(st.integers()).map(tuple),
        low=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    ),
)


@settings(max_examples=100)
@given(config=configs)
def test_what_to_toml_writes_load_toml_reads_back(tmp_path_factory, config):
    path = toml(tmp_path_factory.getbasetemp(), to_toml(config))
    assert load_toml(path) == config


def test_the_written_configuration_spells_out_every_field():
    text = to_toml(Config())
    for section, name in FIELDS:
        assert re.search(rf"^(# )?{name} ", text.split(f"[{section}]\n")[1].split("\n\n")[0], re.MULTILINE), name


def test_the_configurations_that_come_with_the_project_are_sound():
    paths = sorted((ROOT / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        load_toml(path).check()


def test_model_args_are_used_from_python():
    args = ModelArgs(n_layers=48, n_heads=48)
    args.check()
    assert (args.n_layers, args.n_heads, args.kv_heads, args.head_width) == (48, 48, 48, 16)
    assert ModelArgs(n_heads=48, n_kv_heads=8).kv_heads == 8


@pytest.mark.parametrize(
    ("args", "hidden"),
    [
        (ModelArgs(dim=4096, multiple_of=256), 11008),
        (ModelArgs(dim=5120, multiple_of=256), 13824),
        (ModelArgs(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3), 28672),
    ],
    ids=["7B", "13B", "70B"],
)
def test_the_feed_forward_width_is_metas(args, hidden):
    assert args.hidden_width == hidden


def test_a_refused_command_ends_with_one_line_and_status_2_and_debug_shows_the_traceback(tmp_path):
    path = toml(tmp_path, "[train]\nlr = 'fast'")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(path)]
    quiet = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert quiet.returncode == 2 and quiet.stdout == ""
    assert quiet.stderr == f"error: {path}: train.lr: expected float, found 'fast'\n"
    environment = {"PYTHONPATH": str(ROOT), "LLAMA_JAX_DEBUG": "1"}
    loud = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert loud.returncode != 0 and "Traceback" in loud.stderr and "UserError" in loud.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["--model.n-heads", "7"],
        ["--config"],
        ["--config", "missing.toml"],
        ["--train.lr", "x"],
        ["--model.dim"],
        ["--no"],
    ],
    ids=" ".join,
)
def test_train_py_refuses_bad_arguments_in_one_line_with_status_2(tmp_path, argv):
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False}


def test_a_scaling_of_rotary_embeddings_is_a_flag_a_table_and_a_dict_and_all_are_the_same(tmp_path):
    flags = "--model.rope-scaling rope_type yarn factor 4 original_max_position_embeddings 4096 truncate false"
    by_flag = parse_flags(Config, flags.split(), Config(), "train.py", "").model
    text = '[model.rope_scaling]\ntype = "yarn"\nfactor = 4\noriginal_max_position_embeddings = 4096\ntruncate = false'
    by_table = load_toml(toml(tmp_path, text)).model
    by_dict = ModelArgs(rope_scaling={**YARN, "attention_factor": None})
    assert by_flag == by_table == by_dict and hash(by_flag) == hash(by_dict)
    assert by_dict.rope_scaling == YARN
    again = toml(tmp_path, to_toml(Config(model=by_flag)))
    assert load_toml(again).model == by_flag
    for args in (
        by_flag,
        ModelArgs(rope_scaling={"type": "default"}),
        ModelArgs(head_dim=32, hidden_dim=7, mlp_bias=True),
    ):
        args.check()


def test_no_scaling_has_one_spelling():
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "default"}):
        assert ModelArgs(rope_scaling=scaling) == ModelArgs()


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ("linear", "expected a table or nothing, found 'linear'"),
        ({"rope_type": "longrope", "factor": 2.0}, "found 'longrope'"),
        ({"rope_type": 3}, "expected a rope_type of default, linear, dynamic, llama3, yarn, found 3"),
        ({"rope_type": "linear"}, "expected factor beside rope_type linear, found no factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "found no low_freq_factor"),
        ({"rope_type": "linear", "factor": "two"}, "factor: expected a number above 0, found 'two'"),
        ({"rope_type": "linear", "factor": 0}, "factor: expected a number above 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor: expected a number above 0"),
        ({"rope_type": "linear", "factor": True}, "factor: expected a number above 0"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "found 'beta_fast'; leave it out"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 0.5}, "a number of tokens"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1.0}, "truncate: expected true or false"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "high_freq_factor: expected more than low_freq_factor = 4.0, found 1.0",
        ),
    ],
)  # fmt: skip
def test_a_scaling_that_is_not_computed_is_refused_by_its_key(scaling, words):
    with pytest.raises(UserError, match=r"model\.rope_scaling: ") as caught:
        ModelArgs(rope_scaling=scaling).check()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_document_has_no_length_of_its_own_beside_a_scaling_that_depends_on_it():
    model = ModelArgs(rope_scaling={"type": "dynamic", "factor": 2.0})
    Config(model=model).check()
    with pytest.raises(UserError, match=r"data\.document_mask: .*rope_scaling dynamic"):
        Config(model=model, data=DataArgs(document_mask=True)).check()


def test_heads_of_their_own_size_need_not_divide_the_width():
    ModelArgs(dim=20, n_heads=3, head_dim=8).check()
    with pytest.raises(UserError, match=r"model\.n_heads: expected a divisor"):
        ModelArgs(dim=20, n_heads=3).check()
    with pytest.raises(UserError, match=r"model\.head_dim: expected heads of an even number"):
        ModelArgs(head_dim=7).check()
