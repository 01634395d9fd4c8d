"""Document masks: which document each token of a window is of, and its position there.

A stream of tokens is BOS document EOS BOS document EOS ..., and a window is cut out of it anywhere. A BOS begins a
document. The document that a window begins within starts again at position 0, without the tokens that were cut off.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from llama_jax.data.batches import Batch, PackedBatch, PairBatch, with_documents
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

# The number of a stream's tokens that are looked at before a run.
LOOKED_AT = 1_000_000


def masked(batches: Iterable[Batch | PackedBatch | PairBatch], bos_id: int) -> Iterator[PackedBatch | PairBatch]:
    """Yield each batch with its documents; see ``with_documents``. One that is packed has them."""
    for batch in batches:
        yield with_documents(batch, bos_id) if isinstance(batch, Batch) else batch


def check_marks(tokenizer: Tokenizer) -> None:
    """Raise UserError if the tokenizer does not mark both ends of a document, each with a token of its own."""
    if tokenizer.bos_id == tokenizer.eos_id:
        raise UserError(
            f"data.document_mask: expected a tokenizer with BOS and EOS, which mark where documents begin and end, found "
            f"{tokenizer.model_path} with {tokenizer.piece(tokenizer.bos_id)!r} alone; leave the flag out, or take another tokenizer"
        )


def check_documents(first: np.ndarray, bos_id: int, source: str) -> None:
    """Raise UserError if no document begins in the first tokens of ``source``, int [tokens].

    Other programs make token files that mark the end of a document alone. A mask would then take each window for one
    document.
    """
    if not np.any(first == bos_id):
        raise UserError(
            f"data.document_mask: expected documents that begin with BOS (id {bos_id}), found none in the first {len(first):,} "
            f"tokens of {source}; leave the flag out, or give the original text"
        )
