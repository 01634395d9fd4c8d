"""Low-rank adapters by Hugging Face's PEFT, as its users train them: the peer of benchmarks/train_step.py --lora.rank."""

from collections.abc import Iterable

import peft
import transformers
from torch import Tensor, nn

from llama_jax.config import ModelArgs
from llama_jax.lora_args import LoraArgs

MODULES = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "output": "lm_head",
}  # fmt: skip


class PeftLlama(nn.Module):
    """transformers' LLaMA with adapters; its forward pass returns the mean loss."""

    def __init__(self, args: ModelArgs, lora: LoraArgs):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.hidden_width,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.max_seq_len,
            rms_norm_eps=args.norm_eps,
        )
        adapters = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.strength),
            lora_dropout=lora.dropout,
            target_modules=[MODULES[name] for name in lora.targets],
        )
        self.model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)
        self.model.config.use_cache = False

    def trained(self) -> Iterable[nn.Parameter]:
        """The adapters."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """int [B, T], int [B, T] -> nats a token."""
        logits = self.model(inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
