"""Tiny random models of transformers with the keys of a published config.json, and what transformers says of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

from llama_jax.config import SampleArgs  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from tests.families import FAMILIES  # noqa: E402

# Published config.json files.
LLAMA_32_1B = FAMILIES["LLaMA 3.2 1B"]
MISTRAL_01, MISTRAL_03 = FAMILIES["Mistral 7B v0.1"], FAMILIES["Mistral 7B v0.3"]


def tiny(folder: Path, table: dict[str, Any], tokenizer: Tokenizer, **changes: Any) -> Any:
    """Save a random model with the keys of ``table`` at a tiny size, in float32, and return it."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
        "max_position_embeddings": 4096, "torch_dtype": "float32",
    } | ({"head_dim": 16} if "head_dim" in table else {})  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table | sizes | changes))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        # Logits of about 1, and norms away from one.
        std = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
        parameter.data.normal_(0 if parameter.ndim == 2 else 1, std)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(table | sizes | changes))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return model


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Transformers' logits of int [B, T]: float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids, np.int64))).logits.float().numpy()


def greedy(model: Any, prompt: list[int], count: int, eos: int) -> list[int]:
    """The ``count`` ids that transformers' generate appends to a prompt, EOS never among them."""
    found = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=count,
        suppress_tokens=[eos], pad_token_id=0,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def check_says_the_same(ours: Any, reference: Any, ids: np.ndarray) -> None:
    """Check that our model has the logits of transformers', and writes what it writes."""
    assert np.abs(np.asarray(ours.logits(ids)) - logits(reference, ids)).max() < 1e-4
    prompt, eos = ids[0, :40].tolist(), ours.tokenizer.eos_id
    args = SampleArgs(temperature=0.0, max_new_tokens=50, logit_bias={eos: -np.inf})
    assert ours.generate_ids([prompt], args)[0].token_ids == greedy(reference, prompt, 50, eos)


class Loss(torch.nn.Module):
    """The mean loss of a model of transformers, int [B, T], int [B, T] -> nats a token."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, inputs: Any, targets: Any) -> Any:
        found = self.model(inputs).logits
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten())


def train_both(reference: Any, folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Losses of ``steps`` steps of AdamW on a stream that can be learnt: of our checkpoint, and of transformers' model."""
    import jax

    from llama_jax.build import make_model
    from llama_jax.checkpoint import Checkpoint
    from llama_jax.config import MeshArgs
    from llama_jax.data.batches import train_batches
    from llama_jax.devices.sharding import make_mesh
    from llama_jax.training.step import compile_train_step, init_state, make_optimizer, state_shapes
    from tests.training.test_torch_parity import STEPS, TRAIN, torch_run

    checkpoint = Checkpoint.find(folder)
    args = checkpoint.args
    rng = np.random.default_rng(0)
    stream = np.cumsum(rng.integers(1, 4, size=20_000)).astype(np.uint16) % np.uint16(args.vocab_size)
    data = list(train_batches(stream, TRAIN.batch_size, args.max_seq_len, 0, 0, steps))
    module, mesh = make_model(args, "float32"), make_mesh(MeshArgs(data=1), jax.devices()[:1])
    optimizer = make_optimizer(TRAIN, STEPS)
    params = checkpoint.restore("params", state_shapes(module, optimizer, mesh).params)
    state = init_state(module, optimizer, mesh, 0, params)
    step = compile_train_step(module, optimizer, mesh, 1, data[0])
    losses = []
    for batch in data:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    torch.set_num_threads(1)
    return losses, torch_run(Loss(reference), data)[0]
