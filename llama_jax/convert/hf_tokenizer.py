"""tokenizer.json for Hugging Face's tokenizers: a SentencePiece BPE model, so that it encodes as SentencePiece does.

transformers can read tokenizer.model by itself, but then drops the space that SentencePiece puts before a text that begins
with one. The pieces of the pipeline are documented in huggingface/tokenizers (Normalizers, Models, Decoders).
"""

from typing import Any

from llama_jax.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's mark of a space


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The table of tokenizer.json, or None for a vocabulary that is no BPE with SentencePiece's settings for LLaMA."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    scores = [tokenizer.score(i) for i in range(tokenizer.vocab_size)]
    words = [i for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)]
    # A BPE trainer scores its pieces by their rank; a unigram model by log-probabilities.
    if any(scores[i] != int(scores[i]) for i in words) or tokenizer.unk_id < 0:
        return None
    special = sorted({tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id})
    bos = pieces[tokenizer.bos_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for i in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges({pieces[i]: scores[i] for i in words}),
        },
    }  # fmt: skip


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """All pairs of pieces that make up a piece, the best piece first: SentencePiece merges whatever pair makes the best one."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    return [[left, right] for _, _, left, right in sorted(merges)]
