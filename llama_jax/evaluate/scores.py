"""Scores of a model on a task: the requests that its items make, and the numbers that their log-likelihoods give."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.chat.examples import chat_example
from llama_jax.chat.messages import Message
from llama_jax.errors import UserError, quoted
from llama_jax.evaluate.scoring import Request, Score, context_of, encode_pairs, fit, score, whole
from llama_jax.evaluate.tasks import WITHOUT_SHOTS, Item, Task, check_shots, joined, prompt_of
from llama_jax.generation import Model

# e to the power of more than this is infinite.
MOST_NATS = 700.0


class Asked(NamedTuple):
    """An item in the form that the model gets."""

    prompt: str
    """The text before the continuations, with the examples of a few-shot prompt."""
    continuations: list[str]
    """The texts that are scored. Of a document: the document."""
    requests: list[Request]
    """A request per continuation. Of a document: one per window."""
    cut: int
    """Tokens left out at the beginning of the longest request, so that it fits the context."""


def asked(model: Model, task: Task, shots: int = 0, seed: int = 0) -> list[Asked]:
    """Encode the items of a task for a model. Raises UserError if a choice has no tokens or exceeds the context."""
    if task.kind == "texts":
        return [Asked("", [item.gold], _windows(model, item.gold), 0) for item in task.items]
    if task.kind == "chats":
        return [_asked_in_chat(model, task, item) for item in task.items]
    prompts = [prompt_of(task, index, shots, seed) for index in range(len(task.items))]
    continuations = [
        [joined(prompt, choice) for choice in item.choices] for prompt, item in zip(prompts, task.items, strict=True)
    ]
    pairs = [(prompt, text) for prompt, texts in zip(prompts, continuations, strict=True) for text in texts]
    encoded = iter(encode_pairs(model.tokenizer, pairs))
    found = []
    for item, prompt, texts in zip(task.items, prompts, continuations, strict=True):
        requests, cut = [], 0
        for text in texts:
            request = next(encoded)
            try:
                if not request.continuation:
                    raise UserError("expected a choice with tokens of its own, found one that its prompt takes in")
                request, more = fit(request, context_of(model))
            except UserError as error:
                raise UserError(f"{task.path}: line {item.line}: {error}; shorten {text.strip()[:40]!r}") from None
            requests.append(request)
            cut = max(cut, more)
        found.append(Asked(prompt, texts, requests, cut))
    return found


def _asked_in_chat(model: Model, task: Task, item: Item) -> Asked:
    """Encode a conversation and its answer as training does. The answer has the token that ends it."""
    try:
        fed = model.encode_chat(item.messages)
        ids, counts = chat_example(
            model.tokenizer, [*item.messages, Message("assistant", item.gold)], model.chat_format
        )
        end = max(i for i, counted in enumerate(counts, 1) if counted)
        request, cut = fit(Request(fed, ids[len(fed) : end]), context_of(model))
    except UserError as error:
        raise UserError(f"{task.path}: line {item.line}: {error}") from None
    return Asked(model.tokenizer.decode(fed), [item.gold], [request], cut)


def _windows(model: Model, text: str) -> list[Request]:
    """Return a document as requests that predict each of its tokens once, as the lm-eval harness does.

    The first begins with BOS. The others begin with the last token of the one before; the last one, with as many of the
    tokens before as fill the context.
    """
    tokenizer, context = model.tokenizer, context_of(model)
    ids = [tokenizer.bos_id, *tokenizer.encode(text, bos=False)]  # also of a tokenizer that begins no text so
    requests = []
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        begin = max(0, end - context) if start else 0
        requests.append(Request(ids[begin : start + 1], ids[start + 1 : end + 1]))
    return requests


class Result(NamedTuple):
    """The scores of a model on a task."""

    summary: dict[str, Any]
    """The object that the command prints."""
    per_item: list[dict[str, Any]]
    """The scores of each item, and the texts that they are of."""


def evaluate_task(
    model: Model,
    task: Task,
    shots: int = 0,
    seed: int = 0,
    rows: int = 0,
    on_batch: Callable[[int], None] | None = None,
    share: bool = True,
    items: Sequence[Asked] | None = None,
) -> Result:
    """Score a model on a task.

    Arguments:
        model: the model.
        task: the task.
        shots: examples before each item, other records of the same file. Documents have none.
        seed: decides which examples.
        rows: items in a forward pass. 0: as many as fill it.
        on_batch: is called after each forward pass with the number of items that it finished. None: nothing is.
        share: whether the choices of an item are scored together. It changes the speed alone.
        items: what ``asked`` returns for the task. None: it is asked.

    Raises UserError if an argument is of another type, the task has too few records for the shots, a record does not
    fit the model, or a score is not finite.
    """
    if not isinstance(model, Model):
        raise UserError(f"model: expected a model that is loaded, found {quoted(model)}; llama_jax.load makes one")
    if not isinstance(task, Task):
        raise UserError(f"task: expected a Task, found {quoted(task)}; read_tasks returns a list of them")
    seed = whole("--seed", seed, 0)
    shots, rows = whole("--shots", shots, 0), whole("--batch-size", rows, 0)
    check_shots(task, shots)
    shots = 0 if task.kind in WITHOUT_SHOTS else shots
    items = asked(model, task, shots, seed) if items is None else items
    requests = [request for item in items for request in item.requests]
    item_of = [i for i, item in enumerate(items) for _ in item.requests]
    left = [len(item.requests) for item in items]

    def count(numbers: Sequence[int]) -> None:
        for number in numbers:
            left[item_of[number]] -= 1
        if on_batch is not None:
            on_batch(sum(left[i] == 0 for i in {item_of[number] for number in numbers}))

    scores = iter(score(model, requests, rows, share, count))
    of_items = [[next(scores) for _ in item.requests] for item in items]
    summary = {"task": task.name, "kind": task.kind, "n": len(items)}
    if task.kind == "texts":
        numbers, per_item = _of_texts(model, task, of_items)
    else:
        numbers, per_item = _of_choices(task, items, of_items)
    return Result(
        summary | numbers | {"shots": shots, "seed": seed, "cut": sum(item.cut > 0 for item in items)}, per_item
    )


def _of_choices(
    task: Task, items: Sequence[Asked], of_items: Sequence[Sequence[Score]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the numbers of multiple choice, or of answers to give, and what the model says of each item."""
    per_item = []
    for i, (item, one, scores) in enumerate(zip(task.items, items, of_items, strict=True)):
        sums = np.array([score.loglikelihood for score in scores])
        sizes = [len(choice.encode()) for choice in item.choices]
        found: dict[str, Any] = {"item": i, "line": item.line, "prompt": one.prompt, "continuations": one.continuations}
        found |= {"loglikelihoods": sums.tolist(), "tokens": [score.tokens for score in scores], "bytes": sizes}
        found |= {"greedy": [score.greedy for score in scores], "answer": item.answer, "cut": one.cut}
        if task.kind == "choices":
            chosen, by_size = int(np.argmax(sums)), int(np.argmax(sums / sizes))
            found |= {"chosen": chosen, "chosen_norm": by_size}
            found |= {"correct": chosen == item.answer, "correct_norm": by_size == item.answer}
        else:
            found |= {"correct": scores[0].greedy}
        per_item.append(found)
    accuracy, stderr = _mean([found["correct"] for found in per_item])
    numbers: dict[str, Any] = {"accuracy": accuracy, "stderr": stderr, "accuracy_norm": None, "stderr_norm": None}
    if task.kind == "choices":
        numbers["accuracy_norm"], numbers["stderr_norm"] = _mean([found["correct_norm"] for found in per_item])
    right = [scores[item.answer] for item, scores in zip(task.items, of_items, strict=True)]
    loss = -sum(score.loglikelihood for score in right) / sum(score.tokens for score in right)
    return numbers | _of_loss(loss) | {"bits_per_byte": None}, per_item


def _of_texts(
    model: Model, task: Task, of_items: Sequence[Sequence[Score]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the numbers of documents, and what the model says of each."""
    per_item: list[dict[str, Any]] = []
    tokenizer = model.tokenizer
    for i, (item, windows) in enumerate(zip(task.items, of_items, strict=True)):
        total, tokens = sum(score.loglikelihood for score in windows), sum(score.tokens for score in windows)
        size = len(item.gold.encode())
        kept = tokenizer.decode(tokenizer.encode(item.gold)) == item.gold
        found = {"item": i, "line": item.line, "loglikelihood": total, "tokens": tokens, "bytes": size}
        found |= {"perplexity": _of_loss(-total / tokens)["perplexity"]}
        per_item.append(found | {"bits_per_byte": -total / math.log(2) / size if kept else None})
    total, tokens, size = (sum(found[key] for found in per_item) for key in ("loglikelihood", "tokens", "bytes"))
    kept = all(found["bits_per_byte"] is not None for found in per_item)
    none = dict.fromkeys(("accuracy", "stderr", "accuracy_norm", "stderr_norm"))
    bits = -total / math.log(2) / size if kept else None
    return none | _of_loss(-total / tokens) | {"bits_per_byte": bits}, per_item


def _of_loss(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, MOST_NATS))}


def _mean(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Return the mean and its standard error, sqrt(p (1 - p) / (n - 1)), or None for a single item."""
    n, mean = len(correct), sum(correct) / len(correct)
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None
