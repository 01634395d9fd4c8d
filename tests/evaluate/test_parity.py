"""Log-likelihoods of choices against Hugging Face transformers, which reads each choice by itself."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

import llama_jax  # noqa: E402
from llama_jax.evaluate.scores import evaluate_task  # noqa: E402
from llama_jax.evaluate.suite import TASKS, records  # noqa: E402
from llama_jax.evaluate.tasks import Task, read_tasks  # noqa: E402
from tests import inside  # noqa: E402


@pytest.fixture(scope="module")
def peer(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    argv = ["convert_torch_weights.py", "--input", "runs/tiny", "--output", str(folder), "--to", "huggingface"]
    result = inside.run(argv, place)
    assert result.returncode == 0, result.stderr
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mixed(folder: Path, count: int) -> Task:
    """Items of all tasks of the suite, whose contexts are cut to many lengths, in random order."""
    rng = random.Random(count)
    found = []
    for name in TASKS:
        for one in records(name, count // len(TASKS)):
            words = one["context"].split(" ")
            found.append(one | {"context": " ".join(words[-rng.randint(1, 60) :])})
    rng.shuffle(found)
    folder.mkdir(exist_ok=True)
    (folder / "mixed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    (task,) = read_tasks([str(folder / "mixed.jsonl")])
    return task


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_choices_have_the_log_likelihoods_of_transformers(count: int, peer: Any, place: Path, tmp_path: Path) -> None:
    model = llama_jax.load(str(place / "runs" / "tiny"))
    context = model.args.max_seq_len
    task = mixed(tmp_path, count)
    encode = model.tokenizer.encode
    for shots in (0, 2):
        found = evaluate_task(model, task, shots).per_item
        for rows, share in ((3, True), (5, False)):
            others = evaluate_task(model, task, shots, 0, rows, share=share).per_item
            for one, other in zip(found, others, strict=True):
                assert other["loglikelihoods"] == pytest.approx(one["loglikelihoods"], abs=1e-4)
        assert any(one["cut"] for one in found) or not shots, "this context is small"
        for one in found:
            for text, total in zip(one["continuations"], one["loglikelihoods"], strict=True):
                prompt = one["prompt"]
                ids, start = encode(prompt + text), len(encode(prompt.rstrip()))
                size = len(ids) - start
                read = torch.tensor([ids[-context - 1 :]])
                with torch.no_grad():
                    logprobs = torch.log_softmax(peer(read[:, :-1]).logits.double(), -1)[0]
                own = logprobs[-size:].gather(1, read[0, -size:, None])
                assert total == pytest.approx(float(own.sum()), abs=1e-4)
