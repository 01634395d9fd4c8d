"""The same LLaMA 2 in PyTorch, as its users write it: the peer that benchmarks/train_step.py measures against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_jax.config import ModelArgs


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Block(nn.Module):
    """Attention and feed-forward layer; torch's own fused causal attention."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        kv_dim = args.kv_heads * args.head_width
        self.attention_norm, self.ffn_norm = RMSNorm(args.dim, args.norm_eps), RMSNorm(args.dim, args.norm_eps)
        self.wq, self.wo = nn.Linear(args.dim, args.dim, bias=False), nn.Linear(args.dim, args.dim, bias=False)
        self.wk, self.wv = nn.Linear(args.dim, kv_dim, bias=False), nn.Linear(args.dim, kv_dim, bias=False)
        self.w1 = nn.Linear(args.dim, args.hidden_width, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_width, bias=False)
        self.w2 = nn.Linear(args.hidden_width, args.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows, positions, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = (
            w(h).view(rows, positions, -1, self.args.head_width).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        grouped = self.args.kv_heads != self.args.n_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.wo(y.transpose(1, 2).reshape(rows, positions, -1))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves: [B, N, T, H] -> the same."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class TorchLlama(nn.Module):
    """The whole model; its forward pass returns the mean loss."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        exponents = torch.arange(0, args.head_width, 2) / args.head_width
        angles = torch.outer(torch.arange(args.max_seq_len), torch.exp(-math.log(args.rope_theta) * exponents))
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """int [B, T], int [B, T] -> nats a token."""
        x = self.tok_embeddings(inputs)
        cos, sin = self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
