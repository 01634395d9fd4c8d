"""Opens the sources of a mixture, each with tokens of its own, and their tokenizer."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from llama_jax.cli.progress import working
from llama_jax.config import DataArgs
from llama_jax.data.beside import names_of
from llama_jax.data.finding import find_text
from llama_jax.data.manifest import TOKENIZER, Manifest, sha256
from llama_jax.data.mixture import folder_of, parts_of
from llama_jax.data.opened import Data, MixedData
from llama_jax.data.origin import Origin
from llama_jax.data.parts import AnyCorpus
from llama_jax.data.tokens import find_prepared
from llama_jax.data.vocabulary import Sentences
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizer import Tokenizer, is_kept, kept_tokenizer, train_tokenizer

# What the vocabulary of a mixture was trained on.
VOCABULARY = "vocabulary.json"
FILEPATH = "data.filepath:"
# Loads the data of one source: its arguments, its folder, whether the run has read it before, and what it was then.
Load = Callable[[DataArgs, Path, bool, Origin | None], Data]


def load_mixture(
    args: DataArgs, folder: Path, tokenizer_path: Path, begun: bool, began_with: dict[str, Origin], load: Load
) -> MixedData:
    """Return the data of a mixture's sources, which ``load`` makes first if needed. See ``load_data``.

    A run that has begun may get further sources, and others weights.
    """
    if begun and "" in began_with:
        raise UserError(
            f"data.mixture: expected none, as the run began with a single text, {began_with[''].source}; choose another "
            "--train.save-dir; there, --train.init-from goes on from this run's weights"
        )
    tokenizer = _tokenizer(args, folder, tokenizer_path, begun)
    sources = {}
    for name in args.mixture:
        given = replace(source_args(args, name), tokenizer_model_path=str(tokenizer.place))
        known = began_with.get(name)
        with _of_source(name):
            sources[name] = load(given, folder_of(folder, name), begun and known is not None, known)
    if not args.tokenizer_model_path and (prepared := _prepared_in(args)):
        print(f"the tokenizer of {prepared} is that of all sources", flush=True)
    for line in _in_common({name: data.tokens.manifest for name, data in sources.items()}):
        print(line, flush=True)
    return MixedData(sources, shares_of(args), kept_tokenizer(tokenizer_path))


def _in_common(sources: dict[str, Manifest]) -> Iterator[str]:
    """Yield warnings about each two sources that are one text, or that have files of the same content."""
    for (first, one), (second, other) in itertools.combinations(sources.items(), 2):
        if one.text_sha256 == other.text_sha256:
            yield f"warning: {first} and {second} are the same text: its share is that of both"
            continue
        there = {file.sha256 for file in one.text_files if file.bytes} - {""}
        names = [os.path.basename(file.path) for file in other.text_files if file.sha256 in there]
        if names:
            # By a hash, a document is held out in both or in none.
            apart = {one.held_out, other.held_out} != {"documents"} or one.train_size != other.train_size
            yield (
                f"warning: {first} and {second} both have the files {names_of(names)}: their share is that of both"
                + ", and what one of them holds out the other may train on, so that losses are too low; leave them out of one"
                * apart
            )


def open_mixture(
    args: DataArgs, folder: Path, tokenizer_path: Path, open_source: Callable[[DataArgs, Path], Data]
) -> MixedData:
    """Open the data that another process's ``load_mixture`` made."""
    opened, tokenizer = {}, kept_tokenizer(tokenizer_path)
    for name in args.mixture:
        given = replace(source_args(args, name), tokenizer_model_path=str(tokenizer.place))
        opened[name] = open_source(given, folder_of(folder, name))
    return MixedData(opened, shares_of(args), tokenizer)


def source_args(args: DataArgs, name: str) -> DataArgs:
    """Return the arguments of one source."""
    return replace(args, mixture={}, filepath=name)


def shares_of(args: DataArgs) -> dict[str, float]:
    """Return the share of the rows that each source has."""
    parts = parts_of(args.mixture)
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def _tokenizer(args: DataArgs, folder: Path, path: Path, begun: bool) -> Tokenizer:
    """Return the tokenizer of all sources: the given one, that of the prepared ones, or one trained on the mixture."""
    if args.tokenizer_model_path:
        return Tokenizer(args.tokenizer_model_path)
    if (prepared := find_prepared(_prepared_in(args))) is not None:
        return kept_tokenizer(prepared / TOKENIZER)
    if begun and is_kept(path):
        return kept_tokenizer(path)  # each source's tokens tell whether it is the one that they began with
    return _trained(args, folder, path)


def _prepared_in(args: DataArgs) -> str:
    """Return the first source that has prepared tokens, or ""."""
    return next((name for name in args.mixture if find_prepared(name) is not None), "")


@contextlib.contextmanager
def _of_source(name: str) -> Iterator[None]:
    """Let an error about ``filepath`` name the source of the mixture, which is what the person wrote."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if type(error) is not UserError or not text.startswith(FILEPATH):
            raise
        raise UserError(f"data.mixture, {quoted(name)}:{text.removeprefix(FILEPATH)}") from error


def _trained(args: DataArgs, folder: Path, path: Path) -> Tokenizer:
    """Return a vocabulary trained on all sources by their shares, the one at ``path`` if it was trained on the same."""
    shares = shares_of(args)
    corpora = {}
    for name in args.mixture:
        with _of_source(name):
            corpora[name] = find_text(source_args(args, name), folder_of(folder, name)).corpus
    with working(f"reading {len(corpora)} sources"):
        of = [(corpora[name].digest(), shares[name]) for name in corpora]
    key = sha256(repr((of, args.vocab_size)).encode())
    try:
        known = json.loads((folder / VOCABULARY).read_bytes())
        if known == {"trained_on": key, "tokenizer_sha256": sha256(path.read_bytes())}:
            return Tokenizer(path)
    except (OSError, ValueError):
        pass
    with working(f"training a vocabulary of {args.vocab_size:,} tokens on {len(corpora)} sources"):
        tokenizer = train_tokenizer(_sentences(corpora, shares), args.vocab_size, path)
    table = {"trained_on": key, "tokenizer_sha256": tokenizer.digest}
    write_atomically(folder / VOCABULARY, json.dumps(table))
    return tokenizer


def _sentences(corpora: dict[str, AnyCorpus], shares: dict[str, float]) -> Iterator[str]:
    """Yield the sample of each source that its share allows."""
    for name, corpus in corpora.items():
        yield from Sentences(corpus.parts("train"), shares[name])
