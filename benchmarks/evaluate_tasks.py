"""Multiple choice: prefixes shared against not shared, and the lm-eval harness with our model against its own ``hf``.

python benchmarks/evaluate_tasks.py [--dim 256 --layers 4 --items 32 --context 448 --pairs 3 --threads 2] [--harness]

Both sides of a pair score the same random items, one after the other, on the same cores, in float32, after a first time
that is not counted. A line per pair has the seconds of both; the last line has the median of the ratios. --harness
needs torch, transformers, accelerate and lm_eval.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHOICES = 4


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "dim": 256,
        "layers": 4,
        "items": 32,
        "context": 448,
        "choice": 6,
        "pairs": 3,
        "vocab": 2048,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=8, help="of hf; ours chooses")
    parser.add_argument("--harness", action="store_true")
    return parser.parse_args()


def small_model(args: argparse.Namespace, folder: Path) -> Any:
    """Return a random model with a vocabulary of the built-in stories."""
    import jax

    from llama_jax.build import make_model
    from llama_jax.config import MeshArgs, ModelArgs
    from llama_jax.data.stories import story
    from llama_jax.devices.sharding import make_mesh
    from llama_jax.generation import Model
    from llama_jax.seeds import random_key
    from llama_jax.tokenizer import train_tokenizer

    tokenizer = train_tokenizer((story(0, i).text for i in range(400)), args.vocab, folder / "tokenizer.model")
    shape = ModelArgs(
        dim=args.dim,
        n_layers=args.layers,
        n_heads=args.dim // 32,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=2 * args.context,
    )
    module = make_model(shape, "float32", mesh=make_mesh(MeshArgs(data=1), jax.devices()[:1]))
    params = jax.jit(module.init)(random_key(0), jax.numpy.zeros((1, 1), "int32"))["params"]
    from flax.linen import unbox

    return Model(shape, unbox(params), tokenizer, module)


def texts(args: argparse.Namespace, model: Any) -> list[tuple[str, list[str]]]:
    """Return contexts of about ``--context`` tokens, each with its choices."""
    from llama_jax.data.stories import story

    found = []
    for item in range(args.items):
        ids = model.tokenizer.encode(" ".join(story(1, 20 * item + i).text for i in range(20)))
        words = story(2, item).text.split()
        choices = [" ".join(words[i * args.choice : (i + 1) * args.choice]) for i in range(CHOICES)]
        found.append((model.tokenizer.decode(ids[: args.context]), choices))
    return found


def pairs(
    args: argparse.Namespace, what: str, first: Callable[[], Any], second: Callable[[], Any], tokens: int
) -> None:
    """Time both in turn, and print their seconds and the median of second / first."""
    first(), second()
    ratios = []
    for _ in range(args.pairs):
        seconds = []
        for run in (first, second):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
        rates = " against ".join(f"{tokens / s:,.0f} tokens/s" for s in seconds)
        print(f"{what}: {seconds[0]:.2f} s against {seconds[1]:.2f} s, {rates}, {ratios[-1]:.2f} times")
    print(f"{what}: median {statistics.median(ratios):.2f} times of {args.pairs} pairs")


def main() -> None:
    """Run the comparisons."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from llama_jax.devices.compiling import use_compilation_cache
    from llama_jax.evaluate.scoring import encode_pairs, score

    use_compilation_cache()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(args, folder)
        items = texts(args, model)
        asked = [(context, " " + choice) for context, choices in items for choice in choices]
        requests = encode_pairs(model.tokenizer, asked)
        tokens = sum(len(request.context) + len(request.continuation) - 1 for request in requests)
        print(
            f"{len(items)} items of {CHOICES} choices, {tokens:,} tokens if nothing is shared, {args.threads} threads"
        )
        pairs(
            args,
            "prefixes shared against not",
            lambda: score(model, requests),
            lambda: score(model, requests, share=False),
            tokens,
        )
        if args.harness:
            ours, theirs = harness_models(args, model, folder)
            instances = [instance(*pair) for pair in asked]
            pairs(
                args, "the harness, llama-jax against hf",
                lambda: ours.loglikelihood(instances, True), lambda: theirs.loglikelihood(instances, True), tokens,
            )  # fmt: skip


def instance(*texts: str) -> Any:
    """Return a request of the harness."""
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=texts, idx=0)


def harness_models(args: argparse.Namespace, model: Any, folder: Path) -> tuple[Any, Any]:
    """Return our model of the harness, and its own of the same shape."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from llama_jax.evaluate.harness import LlamaJax

    torch.set_num_threads(args.threads)
    shape = model.args
    config = transformers.LlamaConfig(
        hidden_size=shape.dim, num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, vocab_size=shape.vocab_size,
        intermediate_size=shape.hidden_width, max_position_embeddings=shape.max_seq_len,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()  # float32
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
    return LlamaJax(model=model), HFLM(pretrained=peer, tokenizer=tokenizer, device="cpu", batch_size=args.batch_size)


if __name__ == "__main__":
    main()
