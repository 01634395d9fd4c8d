"""llama2.c's files, in and out: what run.c would compute of a file, in numpy, is what the model computes."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.convert.checkpoint_source import OwnSource
from llama_jax.convert.llama2c import check_llama2c
from llama_jax.errors import UserError
from llama_jax.foreign.llama2c import read_header, read_tokenizer
from llama_jax.tokenizer import Tokenizer
from tests.convert.test_convert import random_weights, read_meta_folder, same_bits, write_meta_folder
from tests.test_model import random_params

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, multiple_of=16, max_seq_len=48)
FLOAT32 = np.dtype("<f4")
MATRICES = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


@pytest.fixture(scope="module")
def args(small_tokenizer: Tokenizer) -> ModelArgs:
    return dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)


# The files as llama2.c's export.py writes them, from tensors in Meta's names.


def stacked(weights: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [weights[f"layers.{i}.{name}.weight"] for i in range(ARGS.n_layers)]


def sizes(args: ModelArgs, vocab_size: int) -> tuple[int, ...]:
    return args.dim, args.hidden_width, args.n_layers, args.n_heads, args.kv_heads, vocab_size, args.max_seq_len


def is_shared(weights: dict[str, np.ndarray]) -> bool:
    return np.array_equal(weights["tok_embeddings.weight"], weights["output.weight"])


def version_0(args: ModelArgs, weights: dict[str, np.ndarray], theta: float = 10000.0) -> bytes:
    shared = is_shared(weights)
    head_dim = args.dim // args.n_heads
    angles = np.outer(np.arange(args.max_seq_len), theta ** (-np.arange(0, head_dim, 2) / head_dim))
    order = [weights["tok_embeddings.weight"], *stacked(weights, "attention_norm")]
    for name in MATRICES[:4]:
        order += stacked(weights, name)
    order += stacked(weights, "ffn_norm")
    for name in MATRICES[4:]:
        order += stacked(weights, name)
    order += [weights["norm.weight"], np.cos(angles), np.sin(angles), *([] if shared else [weights["output.weight"]])]
    header = struct.pack("<7i", *sizes(args, args.vocab_size if shared else -args.vocab_size))
    return header + b"".join(array.astype("<f4").tobytes() for array in order)


def later_header(version: int, args: ModelArgs, shared: bool, rest: bytes = b"") -> bytes:
    header = b"24ka" + struct.pack("<i7iB", version, *sizes(args, args.vocab_size), shared) + rest
    return header.ljust(256, b"\0")


def norms(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [*stacked(weights, "attention_norm"), *stacked(weights, "ffn_norm"), weights["norm.weight"]]


def matrices(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    found = [weights["tok_embeddings.weight"]]
    for name in MATRICES:
        found += stacked(weights, name)
    return found + ([] if is_shared(weights) else [weights["output.weight"]])


def version_1(args: ModelArgs, weights: dict[str, np.ndarray]) -> bytes:
    arrays = norms(weights) + matrices(weights)
    return later_header(1, args, is_shared(weights)) + b"".join(array.astype("<f4").tobytes() for array in arrays)


def quantized(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    groups = matrix.reshape(-1, group)
    scales = (np.abs(groups).max(axis=1) / np.float32(127)).astype(np.float32)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def version_2(args: ModelArgs, weights: dict[str, np.ndarray], group: int = 32, last: bool = False) -> bytes:
    """``last``: all scales stand behind all integers, as an early export.py wrote them."""
    parts = [quantized(matrix, group) for matrix in matrices(weights)]
    pieces = [q.tobytes() + s.tobytes() for q, s in parts]
    if last:
        pieces = [q.tobytes() for q, _ in parts] + [s.tobytes() for _, s in parts]
    header = later_header(2, args, is_shared(weights), struct.pack("<i", group))
    return header + b"".join(array.astype("<f4").tobytes() for array in norms(weights)) + b"".join(pieces)


# run.c's forward pass, position after position, from the bytes of a file of version 0.


def run_c(path: Path, tokens: list[int]) -> np.ndarray:
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", content)
    shared, vocab, head = vocab > 0, abs(vocab), dim // heads
    at = 28

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        array = np.frombuffer(content, "<f4", int(np.prod(shape)), at).reshape(shape)
        at += array.nbytes
        return array

    table, att_norm = take(vocab, dim), take(layers, dim)
    wq, wk, wv = take(layers, dim, dim), take(layers, kv_heads * head, dim), take(layers, kv_heads * head, dim)
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final = take(dim)
    at += length * head * 4
    classes = table if shared else take(vocab, dim)
    assert at == len(content)

    def rmsnorm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).sum() / len(x) + 1e-5)

    keys = np.zeros((layers, length, kv_heads * head))
    values = np.zeros_like(keys)
    logits = []
    for pos, token in enumerate(tokens):
        x = table[token].astype(np.float64)
        for i in range(layers):
            h = rmsnorm(x, att_norm[i])
            q, k, v = wq[i] @ h, wk[i] @ h, wv[i] @ h
            for j in range(0, dim, 2):
                angle = pos * (1.0 / 10000.0 ** ((j % head) / head))
                for vector in (q, k) if j < kv_heads * head else (q,):
                    a, b = vector[j], vector[j + 1]
                    vector[j] = a * np.cos(angle) - b * np.sin(angle)
                    vector[j + 1] = a * np.sin(angle) + b * np.cos(angle)
            keys[i, pos], values[i, pos] = k, v
            out = np.zeros(dim)
            for n in range(heads):
                part = slice(n * head, (n + 1) * head)
                kv = slice(n // (heads // kv_heads) * head, (n // (heads // kv_heads) + 1) * head)
                scores = keys[i, : pos + 1, kv] @ q[part] / np.sqrt(head)
                weights = np.exp(scores - scores.max())
                out[part] = weights / weights.sum() @ values[i, : pos + 1, kv]
            x = x + wo[i] @ out
            h = rmsnorm(x, ffn_norm[i])
            gate = w1[i] @ h
            x = x + w2[i] @ (gate / (1 + np.exp(-gate)) * (w3[i] @ h))
        logits.append(classes @ rmsnorm(x, final))
    return np.stack(logits)


def tied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights | {"output.weight": weights["tok_embeddings.weight"]}


def converted(source: Path, output: Path, **fields: Any) -> Path:
    convert(ConvertArgs(input=str(source), output=str(output), **fields))
    return output


def file_of(content: bytes, folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (folder / "stories.bin").write_bytes(content)
    return folder / "stories.bin"


@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_a_file_is_what_run_c_computes_of_it_and_goes_back_to_the_byte(
    shared: bool, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    weights = random_weights(args, FLOAT32)
    path = file_of(version_0(args, tied(weights) if shared else weights), tmp_path / "in", small_tokenizer)
    ours = converted(path, tmp_path / "ours")
    tokens = [1, *np.random.default_rng(0).integers(3, args.vocab_size, 30).tolist()]
    model = llama_jax.load(str(ours))
    assert model.args.tie_embeddings == shared == ("output" not in model.params)
    found = model.logits(np.array([tokens]))[0]
    np.testing.assert_allclose(found, run_c(path, tokens), atol=1e-4)
    back = converted(ours, tmp_path / "back", to="llama2c")
    assert (back / "model.bin").read_bytes()[: path.stat().st_size - 0][:28] == path.read_bytes()[:28]
    theirs, written = np.fromfile(path, "<f4"), np.fromfile(back / "model.bin", "<f4")
    angles = np.abs(theirs - written) > 0
    assert angles.sum() <= args.max_seq_len * args.head_width, (
        "nothing but a last digit of the tables of angles differs"
    )
    np.testing.assert_allclose(written[7:], theirs[7:], atol=1e-5)
    np.testing.assert_array_equal(run_c(back / "model.bin", tokens), run_c(path, tokens))
    # The folder that is written can be read as it is, by its name or by its file's.
    again = [converted(place, tmp_path / f"again{i}", to="meta") for i, place in enumerate((back, back / "model.bin"))]
    assert all(same_bits(read_meta_folder(folder), tied(weights) if shared else weights) for folder in again)


@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_later_versions_are_read(
    shared: bool, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(args, FLOAT32)
    weights = tied(weights) if shared else weights
    path = file_of(version_1(args, weights), tmp_path / "v1", small_tokenizer)
    assert same_bits(read_meta_folder(converted(path, tmp_path / "meta1", to="meta")), weights)
    path = file_of(version_2(args, weights), tmp_path / "v2", small_tokenizer)
    found = read_meta_folder(converted(path, tmp_path / "meta2", to="meta"))
    said = capsys.readouterr().out
    assert "8-bit integers: they are multiplied by their scales and stored as float32" in said
    assert ("tied embeddings" in said) == shared
    for name, matrix in weights.items():
        if "norm" not in name:
            q, s = quantized(matrix, 32)
            matrix = (q * s[:, None]).reshape(matrix.shape)
        np.testing.assert_array_equal(found[name], matrix)


def test_integers_whose_groups_cross_rows_are_read(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    # The hidden width is no multiple of the group, which divides only dim.
    args = dataclasses.replace(args, multiple_of=1, max_seq_len=16)
    assert args.hidden_width % 64 and args.hidden_width * args.dim % 64 == 0
    weights = random_weights(args, FLOAT32)
    path = file_of(version_2(args, weights, group=64), tmp_path / "v2", small_tokenizer)
    found = read_meta_folder(converted(path, tmp_path / "meta", to="meta"))
    for name in ("layers.1.feed_forward.w2.weight", "layers.0.attention.wk.weight"):
        q, s = quantized(weights[name], 64)
        np.testing.assert_array_equal(found[name], (q * s[:, None]).reshape(weights[name].shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_metas_layout_goes_out(
    dtype: str, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else FLOAT32
    weights = random_weights(args, kind)
    source = write_meta_folder(tmp_path / "meta", args, weights, 2, small_tokenizer, max_seq_len=48)
    out = converted(source, tmp_path / "out", to="llama2c")
    assert sorted(path.name for path in out.iterdir()) == ["model.bin", "tokenizer.bin", "tokenizer.model"]
    wide = {name: matrix.astype(np.float32) for name, matrix in weights.items()}
    found = np.fromfile(out / "model.bin", "<f4")
    np.testing.assert_allclose(found[7:], np.frombuffer(version_0(args, wide), "<f4")[7:], atol=1e-5)
    header = read_header(out / "model.bin")
    assert header is not None and not header.shared and header.max_seq_len == 48


def test_the_vocabulary_is_spelled_as_llama2_c_spells_it(
    small_tokenizer: Tokenizer, args: ModelArgs, tmp_path: Path
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, FLOAT32), 1, small_tokenizer)
    content = (converted(source, tmp_path / "out", to="llama2c") / "tokenizer.bin").read_bytes()
    (longest,), at, pieces = struct.unpack_from("<I", content), 4, []
    while at < len(content):
        score, length = struct.unpack_from("<fI", content, at)
        pieces.append((content[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    assert at == len(content) and len(pieces) == small_tokenizer.vocab_size
    assert longest == max(len(piece.encode()) for piece, _ in pieces)
    assert [piece for piece, _ in pieces[:4]] == ["<unk>", "\n<s>\n", "\n</s>\n", "<0x00>"]
    for i in range(4, len(pieces)):
        assert pieces[i] == (small_tokenizer.piece(i).replace("\u2581", " "), small_tokenizer.score(i))
    assert list(read_tokenizer(tmp_path / "out" / "tokenizer.bin")) == [(p.encode(), s) for p, s in pieces]


def own(args: ModelArgs, tokenizer: Tokenizer, folder: Path) -> OwnSource:
    save_checkpoint(folder, jax.tree.map(jnp.asarray, random_params(args)), args, tokenizer)
    return OwnSource(folder)


def test_what_run_c_cannot_say_is_refused_by_name(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = dataclasses.replace(args, max_seq_len=4096)
    check_llama2c(own(args, small_tokenizer, tmp_path / "own0"))
    check_llama2c(own(dataclasses.replace(args, sliding_window=4096), small_tokenizer, tmp_path / "own1"))
    with pytest.raises(UserError, match=r"--to llama2c: sliding_window: expected None, .* found 9"):
        check_llama2c(own(dataclasses.replace(args, sliding_window=9), small_tokenizer, tmp_path / "own2"))
    weights = random_weights(args, FLOAT32)
    for i, (key, value) in enumerate({"rope_theta": 1e6, "norm_eps": 1e-6}.items()):
        source = write_meta_folder(tmp_path / f"meta{i}", args, weights, 1, small_tokenizer, **{key: value})
        for dry_run in (False, True):
            with pytest.raises(UserError, match=rf"--to llama2c: {key}: expected .* run\.c has in it, found {value}"):
                convert(ConvertArgs(str(source), str(tmp_path / "x"), to="llama2c", dry_run=dry_run))
    assert not (tmp_path / "x").exists()


def test_a_file_without_its_tokenizer_model_says_what_to_give(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = file_of(version_0(args, random_weights(args, FLOAT32)), tmp_path / "in", small_tokenizer)
    model = path.with_name("tokenizer.model").rename(tmp_path / "t.model")
    path.with_name("tokenizer.bin").write_bytes(b"\5\0\0\0")
    with pytest.raises(
        UserError, match=r"stories\.bin: expected tokenizer\.model beside it.*tokenizer\.bin lacks.*--tokenizer"
    ):
        converted(path, tmp_path / "x")
    converted(path, tmp_path / "ours", tokenizer=str(model))


def test_a_tokenizer_bin_of_another_vocabulary_is_told(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(version_0(args, random_weights(args, FLOAT32)), tmp_path / "in", small_tokenizer)
    pieces = [(small_tokenizer.piece(i).encode(), 0.0) for i in range(args.vocab_size)]
    other = struct.pack("<I", 9) + b"".join(struct.pack("<fI", s, len(p)) + p for p, s in pieces)
    path.with_name("tokenizer.bin").write_bytes(other)
    with pytest.raises(UserError, match=r"expected one vocabulary, found two"):
        converted(path, tmp_path / "x")
    converted(path, tmp_path / "ours", tokenizer=str(path.with_name("tokenizer.model")))
    assert "holds other pieces" in capsys.readouterr().out


DAMAGED = {
    "cut short": (lambda c: c[:-100], r"as the header of llama2\.c's model says, found [\d,]+; the file is cut short"),
    "too long": (lambda c: c + b"xxxx", r"cut short, or another"),
    "a later version": (lambda c: b"24ka" + struct.pack("<i", 3) + c[8:], r"version 0, 1 or 2 of llama2\.c's files, found 3"),
    "no sizes": (lambda c: b"24ka" + struct.pack("<i7i", 1, *[-5] * 7) + c[36:], r"expected sizes of a model"),
    "empty": (lambda c: b"", r"found an empty file; download it again"),
    "not a model": (lambda c: b"x" * 500, r"expected a folder, found a file of weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name: str, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    make, words = DAMAGED[name]
    path = file_of(make(version_0(args, random_weights(args, FLOAT32))), tmp_path / "in", small_tokenizer)
    with pytest.raises(UserError, match=words):
        converted(path, tmp_path / "x")


def test_scales_in_another_place_are_refused(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = version_2(args, random_weights(args, FLOAT32), last=True)
    path = file_of(content, tmp_path / "in", small_tokenizer)
    with pytest.raises(UserError, match=r"expected scales of 0 or more.*early version of export\.py"):
        converted(path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tables_of_another_base_are_told(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(args, FLOAT32)
    path = file_of(version_0(args, weights, theta=1e6), tmp_path / "in", small_tokenizer)
    converted(path, tmp_path / "ours")
    assert "tables of angles are not those of rope_theta 10000" in capsys.readouterr().out
    path = file_of(version_0(args, weights), tmp_path / "plain", small_tokenizer)
    converted(path, tmp_path / "ours2")
    assert "tables of angles" not in capsys.readouterr().out
