"""The model of the lm-eval harness, beside the harness's own model on the same tasks, which are made here."""

import contextlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="parity needs lm_eval, which the test extra brings")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import llama_jax.compat.lm_eval_start  # noqa: F401
from llama_jax.chat.named import NAMED
from llama_jax.errors import UserError
from llama_jax.evaluate.harness import LlamaJax
from llama_jax.evaluate.scores import evaluate_task
from llama_jax.evaluate.suite import records
from llama_jax.evaluate.tasks import read_tasks
from llama_jax.generation import Model
from llama_jax.generation.chat import Message, encode_dialog
from llama_jax.tokenizer import Tokenizer
from tests.commands import ROOT
from tests.generation.models import build
from tests.tokenizers.made import CONFIG, EOS, TURN, bytewise, put

WORDS = ["the owl", "a fox", "the river", "boats and ducks", "an old tree", "the sea"]


def asked(*args: Any, kind: str = "loglikelihood") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer, max_seq_len=128)


@pytest.fixture(scope="module")
def harness(model: Model) -> LlamaJax:
    return LlamaJax(model=model)


def test_the_harness_finds_the_model_by_its_name() -> None:
    assert get_model("llama-jax") is get_model("llama_jax") is LlamaJax
    assert get_model("hf") is not None, "beside its own"


def test_the_file_that_python_reads_at_its_start_is_enough_and_imports_nothing(tmp_path: Path) -> None:
    """As it is installed: the module under its other name, and the .pth file that names it."""
    compat = ROOT / "llama_jax" / "compat"
    (tmp_path / "_llama_jax_lm_eval.py").write_text((compat / "lm_eval_start.py").read_text())
    (tmp_path / "llama_jax_lm_eval.pth").write_text((compat / "lm_eval_start.pth").read_text())
    program = (
        "import sys, site; before = {*sys.modules}; site.addsitedir(sys.argv[1]); "
        "made = {*sys.modules} - before; "  # nothing where the package is installed, which has done the same
        "assert made <= {'_llama_jax_lm_eval'} and '_llama_jax_lm_eval' in sys.modules; "
        "from lm_eval.api.registry import get_model; print(get_model('llama-jax').__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("LlamaJax False\n", 0), done.stderr


def test_log_likelihoods_are_those_of_evaluation(harness: LlamaJax, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records("agreement", 5)))
    (task,) = read_tasks([str(path)])
    found = evaluate_task(model, task).per_item
    pairs = [(item.prompt, " " + choice) for item in task.items for choice in item.choices]
    answers = harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    wanted = [total for item in found for total in item["loglikelihoods"]]
    assert [total for total, _ in answers] == pytest.approx(wanted, abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for item in found for greedy in item["greedy"]]


def test_a_generation_is_the_models_own_up_to_a_stop(harness: LlamaJax, model: Model) -> None:
    (free,) = harness.generate_until([asked("The owl", {"until": [], "max_gen_toks": 20})], disable_tqdm=True)
    ids = encode = model.tokenizer.encode("The owl")
    for _ in range(20):
        ids = [*ids, int(np.asarray(model.logits([ids]))[0, -1].argmax())]
        if ids[-1] == model.tokenizer.eos_id:
            break
    assert free == model.tokenizer.decode(ids[len(encode) :])
    stop = free[3:5]
    (cut,) = harness.generate_until([asked("The owl", {"until": [stop], "max_gen_toks": 20})], disable_tqdm=True)
    assert cut == free.split(stop)[0]
    with pytest.raises(UserError, match=r"^generation_kwargs: expected some of until, .*found {'num_beams': 4}"):
        harness.generate_until([asked("The owl", {"num_beams": 4})])


def test_chat_prompts_are_text_whose_tokens_are_those_of_chat(model: Model) -> None:
    history = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The owl."},
        {"role": "user", "content": "Why?"},
    ]
    harness = LlamaJax(model=model, chat_template="llama2")
    text = harness.apply_chat_template(history)
    assert text == ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWho? [/INST] The owl. </s><s>[INST] Why? [/INST]")
    messages = [Message(one["role"], one["content"]) for one in history]  # type: ignore[arg-type]
    assert harness.tok_encode(text) == encode_dialog(model.tokenizer, messages)
    begun = harness.apply_chat_template([*history, {"role": "assistant", "content": "Since"}], False)
    assert begun == text + " Since"
    assert harness.chat_template(True) == NAMED["llama2"].template and harness.tokenizer_name


def test_a_model_without_a_chat_template_says_so(harness: LlamaJax) -> None:
    with pytest.raises(UserError, match="expected a model with a chat template"):
        harness.apply_chat_template([{"role": "user", "content": "Who?"}])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "model_args: expected ckpt=FOLDER"),
        ({"ckpt": "none", "pretrained": "x"}, "model_args: expected some of ckpt, .*found pretrained"),
        ({"ckpt": "none"}, "none: expected a checkpoint folder"),
        ({"ckpt": "none", "compute_dtype": "half"}, "compute_dtype: expected one of"),
    ],
)
def test_arguments_that_are_wrong_are_named(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlamaJax.create_from_arg_obj(arguments, {"batch_size": 1, "device": None})


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("processor", ["BOS", "none"])
def test_contexts_begin_as_by_transformers(
    processor: str,
    stated: bool | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
    monkeypatch.setattr("llama_jax.evaluate.harness._TOLD", set())
    table = bytewise() if processor == "BOS" else bytewise() | {"post_processor": None}
    settings = CONFIG | {"eos_token": EOS} | ({} if stated is None else {"add_bos_token": stated})
    folder = put(tmp_path, table, settings)
    model = build(Tokenizer(folder), max_seq_len=64)
    harness, theirs = LlamaJax(model=model), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The owl saw", "", " a fox"):
        assert harness.tok_encode(text) == theirs(text).input_ids
        assert harness.tok_encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    told = capsys.readouterr().err
    assert ("add_bos_token" in told) == (model.tokenizer.adds_bos != (processor == "BOS"))
    asked_for = [LlamaJax(model=model, add_bos_token=bos).tok_encode("a fox") for bos in (True, False)]
    assert asked_for[0] == [model.tokenizer.bos_id, *asked_for[1]] and not capsys.readouterr().err
    with pytest.raises(UserError, match=r"^add_bos_token: expected True or False, found 'maybe'"):
        LlamaJax(model=model, add_bos_token="maybe")  # type: ignore[arg-type]


def test_the_batch_size_decides_nothing_but_the_passes(model: Model) -> None:
    requests = [asked("The owl saw", " " + word) for word in WORDS]
    found = [LlamaJax(model=model, batch_size=size).loglikelihood(requests, True) for size in (None, 1, "auto", 2)]
    for other in found[1:]:
        assert [total for total, _ in other] == pytest.approx([total for total, _ in found[0]], abs=1e-5)
    with pytest.raises(UserError, match=r"^batch_size: expected auto, or 1 or more, found 'many'"):
        LlamaJax(model=model, batch_size="many")


YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list:
{metrics}
"""


def tasks(folder: Path) -> list[str]:
    """Write local tasks of all kinds of requests. Return their names."""
    rng = random.Random(0)
    sentences = [
        " ".join(
            rng.choices(
                ["the", "owl", "fox", "saw", "a", "river", "boat", "and", "old", "tree", "12", "."],
                k=rng.randint(3, 200),
            )
        )
        for _ in range(12)
    ]
    rows = {
        "local_choices": [record | {"question": record["context"]} for record in records("names", 20)],
        "local_answers": [{"context": text[:60], "answer": "the fox"} for text in sentences],
        "local_texts": [{"page": text} for text in sentences],
        "local_generated": [{"context": text[:40], "answer": "the fox"} for text in sentences],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    metric = "  - metric: {}\n    aggregation: {}\n    higher_is_better: {}"
    settings = {
        "local_choices": ("multiple_choice", "{{context}}", "{{answer}}", 'doc_to_choice: "{{choices}}"',
                          metric.format("acc", "mean", "true") + "\n" + metric.format("acc_norm", "mean", "true")),
        "local_answers": ("loglikelihood", "{{context}}", " {{answer}}", "", metric.format("acc", "mean", "true")),
        "local_texts": ("loglikelihood_rolling", "", "{{page}}", "",
                        metric.format("word_perplexity", "weighted_perplexity", "false")),
        "local_generated": ("generate_until", "{{context}}", "{{answer}}",
                            'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 16\n  do_sample: false',
                            metric.format("exact_match", "mean", "true")),
    }  # fmt: skip
    for name, (kind, text, target, more, metrics) in settings.items():
        (folder / f"{name}.yaml").write_text(
            YAML.format(
                name=name,
                file=folder / f"{name}.jsonl",
                kind=kind,
                text=text,
                target=target,
                more=more,
                metrics=metrics,
            )
        )
    return list(settings)


def run(model: str, arguments: dict[str, Any], folder: Path, names: list[str]) -> dict[str, Any]:
    with contextlib.redirect_stderr(io.StringIO()):
        found = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=names,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            cache_requests=False,
        )
    assert found is not None
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    yield


@pytest.mark.slow
def test_the_harness_says_of_our_model_what_it_says_of_its_own(place: Path, tmp_path: Path, offline: None) -> None:
    """On local tasks of all four kinds: equal accuracies and generations, log-likelihoods within 1e-4."""
    pytest.importorskip("accelerate", reason="parity needs accelerate and torch, which the test extra brings")
    pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
    from tests import forked

    exported = forked.run(
        [
            "convert_torch_weights.py",
            "--input",
            "runs/tiny",
            "--output",
            str(tmp_path / "hf-model"),
            "--to",
            "huggingface",
        ],
        place,
    )
    assert exported.returncode == 0, exported.stderr
    names = tasks(tmp_path)
    ours = run("llama-jax", {"ckpt": str(place / "runs/tiny")}, tmp_path, names)
    theirs = run("hf", {"pretrained": str(tmp_path / "hf-model"), "dtype": "float32", "device": "cpu"}, tmp_path, names)
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            flat_a, flat_b = (np.ravel(np.array(one["resps"], dtype=object)).tolist() for one in (a, b))
            assert len(flat_a) == len(flat_b)
            for x, y in zip(flat_a, flat_b, strict=True):
                if isinstance(y, str) and "\ufffd" in y:
                    # Where bytes are no UTF-8, tokenizers gives a U+FFFD per token of the run; SentencePiece keeps what is.
                    assert x.startswith(y.partition("\ufffd")[0]), name
                else:
                    assert x == (pytest.approx(y, abs=1e-4) if isinstance(y, float) else y), name


def test_an_answer_ends_with_its_turn_and_a_template_without_effect_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(put(tmp_path, bytewise(), CONFIG))
    (path := tmp_path / "turns.jinja").write_text(
        "{% for m in messages %}{{ m.content }}" + TURN + "{% endfor %}", encoding="utf-8"
    )
    ends: list[Any] = []
    complete = Model.completions

    def noting(self: Model, rows: Any, on_progress: Any = None, end_ids: Any = ()) -> Any:
        ends.append(end_ids)
        return complete(self, rows, on_progress, end_ids)

    monkeypatch.setattr(Model, "completions", noting)
    harness = LlamaJax(model=build(tokenizer), chat_template=str(path))
    few = {"max_gen_toks": 2}
    harness.generate_until([asked("The owl", few)], disable_tqdm=True)
    assert "chat_template: no effect without --apply_chat_template" in capsys.readouterr().err
    prompt = harness.apply_chat_template([{"role": "user", "content": "The owl"}])
    harness.generate_until([asked(prompt, few)], disable_tqdm=True)
    assert ends == [(), {tokenizer.eos_id, tokenizer.specials[TURN]}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"chat_template": "lama2"}, "--chat-template: expected a file or one of"),
        ({"max_gen_toks": 0}, "max_gen_toks: expected 1 or more, found 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks: expected 1 or more, found many"),
        ({"max_length": "long"}, "max_length: expected 2 to 128"),
        ({"max_length": 16.7}, "max_length: expected 2 to 128"),
        ({"max_gen_toks": True}, "max_gen_toks: expected 1 or more, found True"),
        ({"max_gen_toks": None}, "max_gen_toks: expected 1 or more, found None"),
        ({"ckpt": "runs/tiny"}, "model_args: expected no ckpt beside a model that is loaded"),
        ({"weights": "int8"}, "model_args: expected no weights beside a model that is loaded"),
        ({"tensor": 2}, "model_args: expected no data, fsdp, tensor or sequence beside a model"),
        ({"model": "runs/tiny"}, "model: expected a model that is loaded, found 'runs/tiny'"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(model: Model, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlamaJax(**{"model": model} | given)
