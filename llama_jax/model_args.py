"""The arguments of a model: the constants in which LLaMA 2 and its relatives differ, checked."""

import dataclasses

from llama_jax.fields import COUNT, LARGEST, POSITIVE, TINY, check_fields, expect
from llama_jax.rope_scaling import RopeScaling, check_scaling, one_spelling


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The shape of a LLaMA 2 model, with the names of Meta's params.json. By default, a 110M-parameter model."""

    dim: int = 768
    """Width of the residual stream, in features."""
    n_layers: int = 12
    """Number of transformer blocks."""
    n_heads: int = 12
    """Number of query heads. It must divide dim, and dim / n_heads must be even."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention). It must divide n_heads. None: same as n_heads."""
    vocab_size: int = -1
    """Number of tokens in the vocabulary. -1: use the tokenizer's."""
    multiple_of: int = 256
    """Round the feed-forward width up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Multiply the feed-forward width by this. None: two thirds of 4 x dim."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm, added to the mean square."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths, in positions."""
    max_seq_len: int = 4096
    """Context length, in tokens: the length of training sequences and the limit of prompt plus completion."""
    rope_scaling: RopeScaling | None = dataclasses.field(default=None, hash=False)
    """Scaling of the rotary embedding to longer contexts, with the keys of config.json: rope_type (linear, dynamic,
    llama3 or yarn), factor, and what else the type has. As a flag: rope_type linear factor 2. None: no scaling."""
    head_dim: int | None = None
    """Number of features per head. It must be even. None: dim / n_heads."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer, in features. None: by Meta's rule, from dim, multiple_of and
    ffn_dim_multiplier."""
    attention_bias: bool = False
    """Add a bias to queries, keys, values and the output of attention."""
    mlp_bias: bool = False
    """Add a bias to the three products of the feed-forward layer."""
    tie_embeddings: bool = False
    """Use the token embeddings as the output matrix too: one array, with the gradients of both uses.
    Models of up to about 3 billion parameters often do, such as LLaMA 3.2 1B."""
    sliding_window: int | None = None
    """Number of positions that a token attends to, itself included, as in Mistral 7B v0.1.
    None: all positions up to its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", one_spelling(self.rope_scaling))

    @property
    def window(self) -> int | None:
        """The sliding window, or None if the context is no longer than it."""
        return self.sliding_window if (self.sliding_window or self.max_seq_len) < self.max_seq_len else None

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads, with None resolved to n_heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """The number of features per head, with None resolved to dim / n_heads."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_width(self) -> int:
        """The width of the feed-forward layer, with None resolved by Meta's rule (llama/model.py, FeedForward): 11008
        for the 7B model."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def check(self) -> None:
        """Raise UserError if no model can have this shape."""
        counts = (
            "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len", "head_dim", "hidden_dim", "sliding_window",
        )  # fmt: skip
        positive = {"norm_eps": POSITIVE, "rope_theta": POSITIVE, "ffn_dim_multiplier": (TINY, 1e6)}
        check_fields(self, "model.", dict.fromkeys(counts, COUNT) | positive | {"vocab_size": (-1, LARGEST)})
        expect(self.vocab_size != 0, "model.vocab_size", "-1 or a positive number", self.vocab_size)
        if self.head_dim is None:
            expect(self.dim % self.n_heads == 0, "model.n_heads", f"a divisor of model.dim = {self.dim}", self.n_heads)
        expect(
            self.head_width % 2 == 0,
            "model.n_heads" if self.head_dim is None else "model.head_dim",
            f"heads of an even number of features, for the rotary embedding (model.dim = {self.dim})",
            f"{self.n_heads} heads of {self.head_width}",
        )
        expect(
            self.n_heads % self.kv_heads == 0,
            "model.n_kv_heads",
            f"a divisor of model.n_heads = {self.n_heads}",
            self.kv_heads,
        )
        width = f"a feed-forward layer of 1 to {LARGEST:,} units"
        expect(0 < self.hidden_width <= LARGEST, "model.ffn_dim_multiplier", width, self.hidden_width)
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling, "model.rope_scaling", self.head_width, self.rope_theta)
