"""Tells what looks wrong about a corpus."""

from llama_jax.data.counting import Documents, Texts, Tokens
from llama_jax.data.lost import share
from llama_jax.tokenizer import Tokenizer

# From these shares on something looks wrong: documents that are copies, characters that are U+FFFD, or controls, tokens that
# are single bytes, or one and the same.
MANY_COPIES, MANY_REPLACED, MANY_CONTROLS, MANY_BYTES, MANY_SAME = 0.05, 0.005, 0.005, 0.2, 0.5
# One of at least so many documents should not hold more than half of the text.
ENOUGH_DOCUMENTS = 10


def of_characters(texts: Texts) -> list[str]:
    """Return what looks wrong about the characters, and about the documents by their characters."""
    lines, count, characters = [], texts.documents.count, texts.characters
    if texts.white == count:
        lines.append("the text is nothing but white space")
    elif texts.white:
        lines.append(f"{_documents(texts.white, count)} nothing but white space")
    if texts.replacements > MANY_REPLACED * characters or texts.replaced:
        lines.append(
            f"{'mostly replacement characters: ' if 2 * texts.replacements >= characters else ''}"
            f"{share(texts.replacements, characters)} of the characters are U+FFFD, which stands for what could not be decoded"
            f"{_mostly(texts.replaced, count)}; decode the original text again"
        )
    if texts.controls > MANY_CONTROLS * characters or texts.binary:
        lines.append(
            f"it looks binary: {share(texts.controls, characters)} of the characters are control characters"
            f"{_many(texts.binary, count)}; extract the text first"
        )
    return lines


def of_documents(documents: Documents, is_plain: bool) -> list[str]:
    """Return what looks wrong about the documents. ``is_plain``: each file of plain text was taken for one."""
    lines, count, copies = [], documents.count, documents.duplicates
    if count == 1:
        separate = "; name what stands between documents with --separator, if there are several" if is_plain else ""
        lines.append(f"the corpus is one document{separate}")
    about = "about " if documents.distinct.is_estimate else ""
    if 2 * copies > count:
        lines.append(
            f"most documents are equal: {about}{copies:,} of {count:,} are exact copies of others; leave copies out"
        )
    elif copies >= MANY_COPIES * count and copies:
        lines.append(f"{about}{share(copies, count)} of the documents are exact copies of others; leave copies out")
    total = sum(length * many for length, many in documents.lengths.items())
    if count >= ENOUGH_DOCUMENTS and 2 * documents.longest_length > total:
        lines.append(f"one document holds {share(documents.longest_length, total)} of the text")
    return lines


def of_tokens(tokenizer: Tokenizer, tokens: Tokens) -> list[str]:
    """Return what looks wrong about the tokens, BOS and EOS aside."""
    lines, total = [], tokens.total
    most, times = tokens.most_frequent
    piece = ascii(tokenizer.piece(most))
    if total == 0:
        lines.append("the text gives no token")
    elif total == 1:
        lines.append(f"the text is one token, {piece}")
    elif times == total:
        lines.append(f"all {total:,} tokens are one and the same, {piece}")
    elif times > MANY_SAME * total:
        lines.append(f"{share(times, total)} of the tokens are one and the same, {piece}")
    single = tokens.of(tokenizer.byte_ids)
    if single > MANY_BYTES * total:
        lines.append(
            f"{share(single, total)} of the tokens are single bytes: the tokenizer does not know these characters; train one on "
            "this text (train-tokenizer), or take another"
        )
    return lines


def _documents(few: int, count: int) -> str:
    return f"{few:,} of {count:,} documents {'is' if few == 1 else 'are'}"


def _mostly(few: int, count: int) -> str:
    return f" ({_documents(few, count)} mostly that)" if few else ""


def _many(few: int, count: int) -> str:
    return f" ({few:,} of {count:,} documents {'has' if few == 1 else 'have'} many)" if few else ""
