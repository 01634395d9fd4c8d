"""Runs on preferences: what they begin with, what they compute, resume and refuse."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.chat.examples import chat_example
from llama_jax.chat.formats import ChatFormat, ChatSetup, choose
from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.data.chat_records import parsed
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.training import loop, reference, samples
from llama_jax.training.clock import TIMES
from tests import processes

MODEL = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=48)
RUN = TrainArgs(
    objective="dpo", lr=2e-3, warmup_steps=1, max_steps=6, batch_size=2, eval_interval=3, eval_iters=0, log_interval=1,
    save_interval=3, keep=9, weight_decay=0.0,
)  # fmt: skip
LORA = LoraArgs(rank=4)
WHOLE = LoraArgs()


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "draw_losses", lambda *_: None)
        patch.setattr(samples, "show", lambda *_, **__: 0)
        yield


def pair(i: int) -> dict[str, Any]:
    animal, place = ("cat", "dog", "owl", "fox")[i % 4], ("sea", "hill", "mill")[i % 3]
    return {"prompt": f"the {animal} by the {place} {i}", "chosen": "sat on the mat", "rejected": "ran to the old sea"}


def train(folder: Path, lora: LoraArgs = LORA, base: str = "base", text: str = "pairs.jsonl", **changes: Any) -> str:
    """What a run prints, in the folder beside its preferences and its base."""
    root = folder.parent
    of_data = {name: changes.pop(name) for name in list(changes) if name in DataArgs.__dataclass_fields__}
    run = dataclasses.replace(RUN, save_dir=str(folder), init_from=str(root / base) if base else "", **changes)
    data = DataArgs(
        str(root / text) if text else "", **{"vocab_size": 300, "train_size": 0.7, "chat_template": "llama2"} | of_data
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(MODEL, data, run, lora=lora))
    return out.getvalue()


def refusal(folder: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        train(folder, *args, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, preferences, and runs on them: of adapters, and of the whole model."""
    root = tmp_path_factory.mktemp("preferences")
    (root / "a.txt").write_text(
        "the cat sat on the mat and the dog ran to the old sea [INST] by the hill [/INST] \n" * 80
    )
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(24)))
    train(root / "base", WHOLE, "", "a.txt", objective="next-token", chat_template="")
    (root / "told.txt").write_text(train(root / "preferred"))
    train(root / "whole", WHOLE, lr=5e-4)
    return root


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("name", ["preferred", "whole"])
def test_a_run_begins_at_log_2_and_learns_which_answer_is_preferred(name: str, root: Path) -> None:
    found = records(root / name)
    assert found[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5) and found[0]["reward_accuracy"] == 0.5
    for key in ("reward_margin", "reward_chosen", "reward_rejected"):
        assert found[0][key] == pytest.approx(0.0, abs=1e-5)
    assert found[-1]["train_loss"] < found[0]["train_loss"] - 0.02
    assert found[-1]["reward_margin"] > 0.02 and found[-1]["reward_accuracy"] > 0.8
    ends = [record["target_tokens"] for record in found]
    assert ends[0] > 0 and all(a < b for a, b in itertools.pairwise(ends))
    for record in found:
        difference = record["reward_chosen"] - record["reward_rejected"]
        assert record["reward_margin"] == pytest.approx(difference, abs=1e-6)
    evaluated = [record for record in found if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [3, 6]
    assert evaluated[-1]["eval_loss"] < math.log(2) and evaluated[-1]["eval_bits_per_byte"] is None
    assert evaluated[-1]["eval_reward_margin"] > 0 and evaluated[-1]["eval_reward_accuracy"] > 0.5


def test_a_run_says_what_it_minimizes_what_is_compared_and_what_counts(root: Path) -> None:
    told = (root / "told.txt").read_text()
    for words in ("objective  DPO with beta 0.1", "reference", "no second model is held", "to train on", "room for two answers",
                  "[/INST][[ sat on the mat </s>]]", "[/INST][[ ran to the old sea </s>]]", "% right", "nats a pair"):  # fmt: skip
        assert words in told, words
    assert 0 < sum(path.stat().st_size for path in (root / "preferred" / "reference").iterdir()) < 200_000


def log_likelihood(model: Any, chat: ChatFormat, prompt: Any, answer: Any) -> float:
    """Of an answer's tokens, from the logits of a loaded model."""
    ids, counts = chat_example(model.tokenizer, [*prompt, *answer], chat)
    log_probs = jax.nn.log_softmax(model.logits(np.array([ids])))[0]
    return float(sum(log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if counts[i]))


@pytest.mark.parametrize("name", ["preferred", "whole"])
def test_the_held_out_loss_is_the_formula_of_the_logits_of_two_loaded_models(name: str, root: Path) -> None:
    """The pairs that are held out are those whose answers the run's tokens have in their part."""
    before, after = llama_jax.load(str(root / "base")), llama_jax.load(str(root / name / "checkpoints" / "6"))
    chat = choose(after.tokenizer, ChatSetup(), "llama2", "")
    folder = root / name / "tokens"
    manifest = json.loads((folder / "manifest.json").read_text())
    held_out = np.fromfile(folder / "eval.bin", np.dtype(manifest["dtype"]))
    text = after.tokenizer.decode(held_out.tolist())
    every = [parsed(pair(i)) for i in range(24)]
    pairs = [each for each in every if f"{each.prompt[0].content} [/INST]" in text]
    assert len(pairs) == manifest["documents"]["eval"] // 2 and 0 < len(pairs) < 24
    losses, margins = [], []
    for prompt, *answers in pairs:
        ratios = [log_likelihood(after, chat, prompt, a) - log_likelihood(before, chat, prompt, a) for a in answers]
        margins.append(0.1 * (ratios[0] - ratios[1]))
        losses.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    record = records(root / name)[-1]
    assert record["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert record["eval_reward_margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert record["eval_reward_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_a_resumed_run_has_the_numbers_of_one_that_never_stopped_bit_for_bit(root: Path) -> None:
    shutil.copytree(root / "preferred", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "6")
    train(root / "resumed", resume_step=3)
    assert records(root / "resumed") == records(root / "preferred")


def test_a_small_state_learns_preferences_resumes_bit_for_bit_and_keeps_its_types(root: Path) -> None:
    small: dict[str, Any] = {"param_dtype": "bfloat16", "moments": "int8"}
    train(root / "small", WHOLE, **small)
    found = records(root / "small")
    assert found[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert found[-1]["reward_margin"] > 0.02 and found[-1]["reward_accuracy"] > 0.8
    for name, other in (("param_dtype", "float32"), ("moments", "bfloat16")):
        message = refusal(root / "small", WHOLE, **small | {name: other})
        assert message.startswith(f"train.{name}: expected '{small[name]}', with which the run in"), message
    shutil.rmtree(root / "small" / "checkpoints" / "6")
    train(root / "small", WHOLE, resume_step=3, **small)
    assert records(root / "small") == found


def test_log_likelihoods_that_are_lost_are_computed_again_by_the_model_that_the_run_began_with(root: Path) -> None:
    shutil.copytree(root / "whole", root / "lost")
    kept = {path.name: path.read_bytes() for path in (root / "lost" / "reference").glob("*.npy")}
    for path in (root / "lost" / "reference").glob("*.npy"):
        path.unlink()
    train(root / "lost", WHOLE, lr=5e-4, resume_step=3)
    assert records(root / "lost") == records(root / "whole")
    assert {path.name: path.read_bytes() for path in (root / "lost" / "reference").glob("*.npy")} == kept
    shutil.rmtree(root / "lost" / "reference")
    message = refusal(root / "lost", WHOLE, base="whole", lr=5e-4, max_steps=7)
    assert message.startswith("train.init_from: expected '") and "found another model" in message
    record = root / "lost" / "run.json"  # of a version that did not note the model, of which the reference knows
    record.write_text(json.dumps(json.loads(record.read_text()) | {"began_with": ""}))
    message = refusal(root / "lost", WHOLE, base="whole", lr=5e-4, max_steps=7)
    assert message.startswith("train.init_from: expected the model that this run began with") and "base" in message


def test_a_kill_while_the_reference_is_read_loses_no_more_than_a_minute(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here everything is written at once, and the second batch is the last."""
    saves: list[int] = []
    original = reference.Part.save

    def save(part: reference.Part) -> None:
        original(part)
        saves.append(len(part.missing))
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference, "SAVE_SECONDS", -1)
        patch.setattr(reference.Part, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(root / "killed")
    assert saves[0] > saves[1]
    batches: list[Any] = []
    batches_of = reference.batches_of
    monkeypatch.setattr(reference, "batches_of", lambda *given: batches.append(given[1]) or batches_of(*given))
    train(root / "killed")
    assert len(batches[0]) == saves[1]
    assert records(root / "killed") == records(root / "preferred")


def test_a_steps_reference_is_what_the_run_began_with_not_the_base_below_it(root: Path) -> None:
    """An adapter that is trained further begins at the loss of a tie. Nothing is told about the base alone."""
    train(root / "further", base="preferred")
    found = records(root / "further")
    assert found[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_label_smoothing_changes_the_run(root: Path) -> None:
    train(root / "smoothed", dpo_label_smoothing=0.3)
    found, known = records(root / "smoothed"), records(root / "preferred")
    assert found[1]["train_loss"] != pytest.approx(known[1]["train_loss"], rel=1e-6)


def test_only_the_sequences_that_steps_and_evaluations_read_are_compared(root: Path) -> None:
    (path,) = (root / "preferred" / "reference").glob("*-train.npy")
    known = np.isfinite(np.load(path))
    assert known.any(axis=1).sum() == known.all(axis=1).sum() == 12 < len(known)


def test_what_does_not_fit_the_objective_is_refused_in_one_line(root: Path) -> None:
    (root / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (root / "odd.jsonl").write_text(
        "".join(json.dumps(pair(i)) + "\n" for i in range(9)) + '{"prompt": "x", "chosen": "y"}\n'
    )
    never = root / "never"
    for args, changes, words in (
        ((LORA, "base", "a.txt"), {}, ("data.filepath: expected preferences", "found text", "a.txt")),
        ((LORA, "base", "chats.jsonl"), {}, ("data.filepath: expected preferences", "found conversations", "--train.objective")),
        ((LORA, "base"), {"objective": "next-token"}, ("line 1: expected a conversation, found a preference", "--train.objective dpo")),
        ((LORA, "base", "odd.jsonl"), {}, ("odd.jsonl: line 10: expected", "prompt, chosen")),
        ((WHOLE, ""), {}, ("train.objective: expected train.init_from beside dpo",)),
        ((LORA, "base"), {"loss_on": "all"}, ("data.loss_on: expected answers",)),
        ((LORA, "base"), {"objective": "next-token", "dpo_beta": 0.3}, ("train.dpo_beta: expected train.objective dpo",)),
        ((LORA, "base"), {"dpo_beta": 0.0}, ("train.dpo_beta: expected",)),
        ((LORA, "base"), {"dpo_label_smoothing": 0.6}, ("train.dpo_label_smoothing: expected",)),
    ):  # fmt: skip
        message = refusal(never, *args, **changes)
        assert all(word in message for word in words), message
        assert not (never / "checkpoints").exists()


def test_the_objective_of_a_run_does_not_change(root: Path) -> None:
    for changes in ({"objective": "next-token"}, {"objective": "next-token", "text": "a.txt"}):
        message = refusal(root / "preferred", max_steps=9, **changes)
        assert message.startswith("train.objective: expected 'dpo', with which the run in"), message


def test_a_mixture_of_preferences_is_read_by_its_weights_and_each_source_is_evaluated(root: Path) -> None:
    (root / "more.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(30, 54)))
    mixture = {str(root / "pairs.jsonl"): 0.5, str(root / "more.jsonl"): 0.5}
    told = train(root / "mixed", text="", mixture=mixture)
    found = records(root / "mixed")
    assert found[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5) and found[-1]["reward_margin"] > 0.02
    of_each = [found[-1][f"eval_loss/{name}"] for name in mixture]
    assert found[-1]["eval_loss"] == pytest.approx(np.mean(of_each)) and told.count("room for two answers") == 2
    assert len(list((root / "mixed" / "reference").glob("*.npy"))) == 4


def test_another_beta_is_told_when_a_run_goes_on(root: Path) -> None:
    shutil.copytree(root / "preferred", root / "other beta")
    told = train(root / "other beta", dpo_beta=0.3, resume_step=3)
    assert "train.dpo_beta 0.1 -> 0.3" in told and "losses and margins up to here and from here on" in told
    found, known = records(root / "other beta"), records(root / "preferred")
    assert found[:3] == known[:3] and found[3]["reward_margin"] == pytest.approx(
        3 * known[3]["reward_margin"], rel=1e-3
    )


def test_pairs_that_teach_nothing_are_left_out_and_counted(root: Path) -> None:
    same = [pair(i) | {"rejected": pair(i)["chosen"]} for i in range(30, 33)]
    long = [pair(i) | {"prompt": "the cat " * 60} for i in range(2)]
    again = [{"prompt": p, "chosen": p + " " + c, "rejected": p + " " + r} for p, c, r in (pair(40).values(),)]
    every = [*map(pair, range(12)), *same, *long, *again]
    (root / "some.jsonl").write_text("".join(json.dumps(each) + "\n" for each in every))
    told = train(root / "some", text="some.jsonl")
    assert "3 pairs were left out, as both answers are the same" in told
    assert "2 were left out, as nothing that counts was left of them" in told
    assert "1 pairs have texts that both begin with their prompt, which is taken off them" in told


@pytest.mark.slow
def test_two_processes_and_eight_devices_have_the_numbers_of_one(root: Path) -> None:
    """Each process reads its own rows, and all know the reference of all of them."""
    settings = {
        "train.init-from": root / "base", "train.objective": "dpo", "data.filepath": root / "pairs.jsonl", "lora.rank": 4,
        "data.chat-template": "llama2", "data.train-size": 0.7, "train.lr": 2e-3, "train.warmup-steps": 1, "train.eps": 1e-3,
        "train.max-steps": 6, "train.batch-size": 8, "train.eval-interval": 3, "train.log-interval": 1,
    }  # fmt: skip

    def run(name: str, count: int, devices: int, **mesh: int) -> list[dict[str, Any]]:
        argv = ["train.py", *(f"--{key}={value}" for key, value in settings.items()), f"--train.save-dir={root / name}"]
        argv += [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
        for status, _, err in processes.end(processes.start(argv, count, devices, fork=False)):
            assert status == 0, err
        return records(root / name)

    one = run("one", 1, 1)
    for found in (run("two", 2, 1, data=1, fsdp=2), run("eight", 1, 8, tensor=2, fsdp=4, data=1)):
        for a, b in zip(found, one, strict=True):
            numbers, expected = ({k: v for k, v in record.items() if v is not None} for record in (a, b))
            assert numbers == pytest.approx(expected, rel=3e-5, abs=2e-6), a["step"]
    assert one[-1]["eval_reward_margin"] > 0.02
