"""The report about a text before training: its documents, and anything surprising about it."""

from llama_jax.data import Data
from llama_jax.data.lost import loss_warning, share
from llama_jax.data.manifest import Manifest
from llama_jax.data.odd_bytes import replacement_warning
from llama_jax.data.parts import Skipped
from llama_jax.data.tokens import SPLITS

# A run with more epochs than this memorizes its text.
MANY_EPOCHS = 100
# A held-out part with fewer tokens does not measure a model.
FEW_TOKENS = 200


def documents_text(manifest: Manifest) -> str:
    """Describe the documents, their lengths, and the shares of unknown tokens and byte tokens."""
    text = f"{manifest.documents['train']:,} to train on, {manifest.documents['eval']:,} held out"
    if manifest.made_by and not any(manifest.documents.values()):
        return "unknown: the ids have no BOS of the tokenizer"
    if (counts := manifest.counts) is None:
        return text
    tokens = sum(manifest.tokens.values())
    unknown, byte_tokens = (share(sum(of.values()), tokens) for of in (counts.unknown, counts.byte_tokens))
    return (
        f"{text}; median {counts.median['train']:,} tokens, longest {max(counts.longest.values()):,}; "
        f"{unknown} unknown tokens, {byte_tokens} byte tokens"
    )


def held_out_text(manifest: Manifest) -> str:
    """Describe how the held-out part was chosen."""
    if manifest.held_out == "own":
        return f"{manifest.eval_source}, a text of its own"
    if manifest.held_out == "given":
        return f"{manifest.eval_source or 'nothing'}, as the token files have it"
    share_held_out = f"{100 * (1 - manifest.train_size):.3g}%"
    if manifest.train_size == 1:
        return "nothing"
    if manifest.held_out == "documents":
        return f"{share_held_out} of the documents, chosen by a hash of their text, so that copies stay together"
    return f"the last {share_held_out} of the {'tokens' if manifest.made_by else 'text, in bytes'}"


def remarks(data: Data) -> list[str]:
    """Return further lines about a text: what was left out, and what may be unintended."""
    manifest = data.tokens.manifest
    skipped = Skipped(manifest.skipped_records, manifest.skipped_examples, manifest.empty_records)
    decided = [f"{data.tokenizer.model_path}: {note}" for note in data.tokenizer.notes]
    lines = [*data.notes, *decided, replacement_warning(manifest.replaced_sequences), skipped_warning(skipped)]
    if manifest.trained_vocab_size > data.tokenizer.vocab_size:
        lines.append(
            f"vocabulary: {manifest.trained_vocab_size:,} was asked for, and the text has pairs for {data.tokenizer.vocab_size:,}"
        )
    if manifest.made_by:
        lines.append(
            f"{data.source}: token files of {manifest.made_by}, read as they are; the bytes of their text are unknown, so that "
            "losses are not in bits per byte"
        )
    elif not manifest.block_bytes:
        lines.append(
            f"{data.source}: these tokens are of an earlier version, without checksums: damage to them would not be noticed"
        )
    if (held_out := manifest.tokens["eval"]) < 2:
        lines.append("nothing is held out: there is no evaluation, and no best step")
    elif held_out < FEW_TOKENS:
        lines.append(f"{held_out:,} tokens are held out: the held-out loss says little")
    if (counts := manifest.counts) is not None:
        lost, compared, unknown = (
            sum(of[split] for split in SPLITS) for of in (counts.lost_bytes, counts.compared_bytes, counts.unknown)
        )
        lines.append(loss_warning(lost, compared, unknown, counts.lost_examples))
        if counts.copies:
            lines.append(
                f"warning: {counts.copies:,} of {manifest.documents['eval']:,} held-out documents are exact copies of documents to "
                "train on, so that the held-out loss is too low"
            )
    return [line for line in lines if line]


def skipped_warning(skipped: Skipped) -> str:
    """Return a line about records that were left out, else an empty text."""
    if skipped.count:
        examples = "; ".join(skipped.examples)
        return f"warning: {skipped.count:,} records cannot be read and were skipped: {examples}"
    if skipped.empty:
        return f"{skipped.empty:,} records have an empty text, which is no document"
    return ""


def repeats_warning(tokens: int, epochs: float, length: int) -> str:
    """Return a warning if ``tokens`` are few for ``epochs`` passes or sequences of ``length``, else an empty text."""
    lines = []
    if tokens < length:
        lines.append(f"the text has {tokens:,} tokens, fewer than a sequence of {length:,}, which repeats it")
    if epochs >= MANY_EPOCHS:
        lines.append(
            f"{tokens:,} tokens are read {epochs:,.0f} times: the model will memorize them; give more text, or fewer steps"
        )
    return f"warning: {'; '.join(lines)}" if lines else ""
