"""Every way to store documents gives the same documents, whoever made the file; what cannot be read is named."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import records as records_module
from llama_jax.data.compression import compression_of
from llama_jax.data.corpus import Records
from llama_jax.data.places import Place, on_disk
from llama_jax.data.records import CorpusFile, records_of
from llama_jax.data.sources import find_files
from llama_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
zstandard = pytest.importorskip("zstandard")
pq = pytest.importorskip("pyarrow.parquet")

ODD = [
    "a", " \n ", "NUL\0 in it", "CRLF\r\nand CR\r", "U+2028 \u2028 and U+2029 \u2029 and U+0085 \x85 are no line ends",
    "\ufeffa mark", "é 字 😀", '"quoted" \\ and {"text": "nested"}', "x" * 10_000_000, "the end\n",
]  # fmt: skip


def json_lines(documents: Sequence[str], path: Path) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))


def pandas_lines(documents: Sequence[str], path: Path) -> None:
    pd.DataFrame({"text": documents, "n": 1}).to_json(path, orient="records", lines=True, force_ascii=False)


def pandas_array(documents: Sequence[str], path: Path) -> None:
    pd.DataFrame({"text": documents, "n": 1}).to_json(path, orient="records", indent=2)


def pandas_parquet(documents: Sequence[str], path: Path) -> None:
    pd.DataFrame({"text": documents, "n": 1}).to_parquet(path, row_group_size=3)


def pandas_category(documents: Sequence[str], path: Path) -> None:
    pd.DataFrame({"text": pd.Categorical(documents), "n": 1}).to_parquet(path)


def arrow_parquet(documents: Sequence[str], path: Path) -> None:
    table = pa.table({"n": [1] * len(documents), "text": pa.array(documents, pa.large_string())})
    pq.write_table(table, path, compression="zstd", row_group_size=2)


def feather(documents: Sequence[str], path: Path) -> None:
    pd.DataFrame({"text": documents}).to_feather(path)


def arrow_stream(documents: Sequence[str], path: Path) -> None:
    table = pa.table({"text": documents})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "JSON lines": json_lines, "JSON lines of pandas": pandas_lines, "an array of pandas": pandas_array,
    "parquet of pandas": pandas_parquet, "parquet of categories": pandas_category, "parquet of pyarrow": arrow_parquet,
    "feather": feather, "an arrow stream": arrow_stream,
}  # fmt: skip
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def documents_of(path: Path, text_field: str = "") -> list[str]:
    return [record.raw.decode() for file in find_files(str(path), text_field=text_field).files for record in records_of(file) if record.raw]  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_records_give_the_documents_that_were_written_whatever_the_files_name(tmp_path: Path, name: str) -> None:
    WRITERS[name](ODD, tmp_path / "documents")
    assert documents_of(tmp_path / "documents") == ODD


@pytest.mark.parametrize("name", ["JSON lines", "parquet of pandas", "an array of pandas"])
@settings(max_examples=40)
@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9))
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, name: str, documents: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    WRITERS[name](documents, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "BLOCK_BYTES", 7)
        assert documents_of(path) == [text for text in documents if text]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["JSON lines", "an array of pandas"])
def test_compressed_records_are_those_of_the_file(tmp_path: Path, packing: str, name: str) -> None:
    WRITERS[name](ODD, tmp_path / "a")
    packed = PACKERS[packing]((tmp_path / "a").read_bytes())
    (tmp_path / "packed").write_bytes(packed)
    (file,) = find_files(str(tmp_path / "packed")).files
    assert file.compression == packing == compression_of(packed)
    assert documents_of(tmp_path / "packed") == ODD
    for cut in (len(packed) // 2, len(packed) - 1):
        (tmp_path / "packed").write_bytes(packed[:cut])
        with pytest.raises(UserError, match=rf"packed: expected a whole {packing} file, found it damaged"):
            documents_of(tmp_path / "packed")


@pytest.mark.parametrize(
    ("tool", "suffix", "flags"),
    [("gzip", "gz", ["-1"]), ("bzip2", "bz2", []), ("xz", "xz", ["-0"]), ("zstd", "zst", ["--long=31", "--no-check"])],
)
def test_what_command_lines_compress_is_read_and_so_are_several_of_it_in_one_file(
    tmp_path: Path, tool: str, suffix: str, flags: list[str]
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    json_lines(ODD[:8], tmp_path / "a.jsonl")
    subprocess.run([tool, "-q", "-k", *flags, tmp_path / "a.jsonl"], check=True)
    packed = tmp_path / f"a.jsonl.{suffix}"
    assert documents_of(packed) == ODD[:8]
    packed.write_bytes(packed.read_bytes() * 2)
    assert documents_of(packed) == ODD[:8] * 2


def test_a_zstd_file_may_begin_with_a_frame_that_readers_skip(tmp_path: Path) -> None:
    json_lines(["a", "b"], tmp_path / "a.jsonl")
    packed = zstandard.ZstdCompressor().compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.zst").write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0text" + packed)
    assert documents_of(tmp_path / "a.zst") == ["a", "b"]


def test_lone_surrogates_in_escapes_and_bytes_that_are_not_utf8_become_u_fffd_and_are_counted(tmp_path: Path) -> None:
    lines = [
        rb'{"text": "a \ud800 b"}',
        rb'{"text": "\udfff\udfff \ud83d\ude00"}',
        b'{"text": "fox", "url": "%s"}' % (b"x" * 200),
        b'{"text": "caf\xe9"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines * 9))
    (tmp_path / "a.json").write_bytes(b"[" + b",".join(lines * 9) + b"]")
    for name in ("a.jsonl", "a.json"):
        corpus = Records(find_files(str(tmp_path / name)).files, 1.0, any_bytes=True)
        texts = [part.text for part in corpus.parts("train")]
        assert texts == ["a \ufffd b", "\ufffd\ufffd 😀", "fox", "caf\ufffd"] * 9
        assert corpus.replaced == 4 * 9


@pytest.mark.parametrize("fast", [True, False])
def test_the_standard_librarys_reader_gives_the_same(
    tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(records_module, "_fast_loads", json.loads)
    content = b'\xef\xbb\xbf{"text": "a", "text": "b", "n": NaN}\r\n\n  \n{"n": 1e999, "text": "\\u0000"}\n{"text": "\\u20282"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    file = CorpusFile(on_disk(tmp_path / "a.jsonl"), "", "json lines", "text")
    assert [(r.number, r.raw) for r in records_of(file)] == [(1, b"b"), (4, b"\0"), (5, "\u20282".encode())]


FAULTS = {
    b"{oops": "expected JSON, found a fault at character",
    b"[1, 2]": "expected an object, found a list",
    b"7": "expected an object, found a number",
    b'{"txt": "a", "id": 1}': "expected a text in the field 'text', found the fields txt, id",
    b'{"text": null}': "expected a text in the field 'text', found null",
    b'{"text": 3}': "expected a text in the field 'text', found a number",
    b'{"text": "a"': "expected JSON, found a fault at character 1",
    b"{}": "expected a text in the field 'text', found no field",
}  # fmt: skip


@pytest.mark.parametrize("bad", FAULTS, ids=ascii)
def test_a_record_that_cannot_be_read_is_named_and_is_an_error_or_skipped_and_counted(
    tmp_path: Path, bad: bytes
) -> None:
    good = [json.dumps({"text": f"document {i}"}).encode() for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:4], bad, *good[4:], bad]))
    files = find_files(str(tmp_path / "a.jsonl")).files
    with pytest.raises(UserError) as error:
        list(Records(files, 1.0).parts("train"))
    assert f"a.jsonl: line 5: {FAULTS[bad]}" in str(error.value) and "--data.bad-records skip" in str(error.value)
    corpus = Records(files, 1.0, skip=True)
    assert [part.text for part in corpus.parts("train")] == [f"document {i}" for i in range(9)]
    assert (
        corpus.skipped.count == 2 and "line 5" in corpus.skipped.examples[0] and "line 11" in corpus.skipped.examples[1]
    )


def test_the_first_line_of_json_lines_may_be_the_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'oops\n{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: expected JSON"):
        list(Records(find_files(str(tmp_path / "a.jsonl")).files, 1.0).parts("train"))


def test_a_line_that_is_too_long_is_a_bad_record_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "MOST_BYTES", 1000)
    json_lines(["a", "x" * 5000, "b"], tmp_path / "a.jsonl")
    corpus = Records(find_files(str(tmp_path / "a.jsonl")).files, 1.0, skip=True)
    assert [part.text for part in corpus.parts("train")] == ["a", "b"]
    assert "line 2: expected up to 1,000 bytes" in corpus.skipped.examples[0]


def test_a_row_without_a_text_is_named_by_its_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c", None, "d"]}), tmp_path / "a.parquet", row_group_size=2)
    files = find_files(str(tmp_path / "a.parquet")).files
    with pytest.raises(UserError, match=r"a\.parquet: row 4: expected a text, found null"):
        list(Records(files, 1.0).parts("train"))
    corpus = Records(files, 1.0, skip=True)
    assert [part.text for part in corpus.parts("train")] == ["a", "b", "c", "d"]
    assert [(unit.group, [part.number for _, part in corpus.read(unit)]) for unit in corpus.units()] == [
        (0, [1, 2]), (1, [3]), (2, [5]),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["parquet of pandas", "feather", "an arrow stream", "an array of pandas"])
def test_a_damaged_file_is_named_even_where_records_may_be_skipped(tmp_path: Path, name: str) -> None:
    WRITERS[name]([f"document {i} " * 40 for i in range(200)], tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=r"a: expected a (whole|JSON array)"):
        list(Records(find_files(str(tmp_path / "a")).files, 1.0, skip=True).parts("train"))


@pytest.mark.parametrize(
    ("record", "wanted", "chosen"),
    [
        ({"text": "a", "title": "b"}, "", "text"),
        ({"content": "a", "id": 1}, "", "content"),
        ({"text": "a", "title": "b"}, "title", "title"),
        ({"title": "a", "body": "b", "id": 1}, "", "found .* with the fields title, body \\(and id without texts\\)"),
        ({"id": 1}, "", "found .* with no field with texts \\(and id without texts\\)"),
        ({"text": "a"}, "body", "^data.text_field: expected texts in the field 'body', found .* the fields text"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_the_field_with_the_text_is_text_or_the_only_one_or_the_fields_are_listed(
    tmp_path: Path, record: dict[str, object], wanted: str, chosen: str, kind: str
) -> None:
    frame = pd.DataFrame([record] * 3)
    if kind == "lines":
        frame.to_json(tmp_path / "a", orient="records", lines=True)
    else:
        frame.to_parquet(tmp_path / "a")
    if chosen in record:
        assert find_files(str(tmp_path / "a"), text_field=wanted).files[0].field == chosen
    else:
        with pytest.raises(UserError, match=chosen):
            find_files(str(tmp_path / "a"), text_field=wanted)


def test_a_stream_of_many_zeros_is_unpacked_in_bounded_pieces(tmp_path: Path) -> None:
    for packing, pack in PACKERS.items():
        (tmp_path / "a").write_bytes(pack(bytes(50_000_000)))
        file = CorpusFile(Place(str(tmp_path / "a"), 0), packing)
        with file.open() as stream:
            assert isinstance(stream, io.BufferedReader)
            assert sum(len(block) for block in iter(lambda: stream.read(1 << 20), b"")) == 50_000_000


def test_a_damaged_page_of_parquet_is_named_where_the_file_has_checksums(tmp_path: Path) -> None:
    table = pa.table({"text": [f"The fox {i} went to the river." for i in range(2000)]})
    for checked in (True, False):
        pq.write_table(
            table, tmp_path / "a.parquet", compression="NONE", use_dictionary=False, write_page_checksum=checked
        )
        raw = bytearray((tmp_path / "a.parquet").read_bytes())
        raw[len(raw) // 2] ^= 1
        (tmp_path / "a.parquet").write_bytes(raw)
        (file,) = find_files(str(tmp_path / "a.parquet")).files
        if checked:
            with pytest.raises(UserError, match=r"a\.parquet: expected a whole parquet file, found it damaged .*CRC"):
                list(records_of(file))
        else:
            assert len(list(records_of(file))) == 2000, "nobody can tell"


NESTED = [
    {"meta": {"text": f"document {i}", "deep": {"body": "b" * i}}, "n": i} if i % 3 else {"meta": None, "n": i}
    for i in range(9)
]


@pytest.mark.parametrize("form", ["lines", "parquet", "arrow"])
def test_a_text_within_another_field_is_read_by_both_names_and_named_where_none_is_given(
    tmp_path: Path, form: str
) -> None:
    table = pa.Table.from_pylist(NESTED)
    if form == "lines":
        (tmp_path / "a").write_text("\n".join(map(json.dumps, NESTED)))
    elif form == "parquet":
        pq.write_table(table, tmp_path / "a", row_group_size=4)
    else:
        with pa.OSFile(str(tmp_path / "a"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    for name, texts in (
        ("meta.text", [f"document {i}" for i in range(9) if i % 3]),
        ("meta.deep.body", ["b" * i for i in range(9) if i % 3]),
    ):
        corpus = Records(find_files(str(tmp_path / "a"), text_field=name).files, 1.0, skip=True)
        assert [part.text for part in corpus.parts("train")] == texts
        assert corpus.skipped.count == 3 and "1: expected a text" in corpus.skipped.examples[0]
    for wanted in ("", "text", "meta.body"):
        with pytest.raises(
            UserError, match=r"texts within them, meta\.text, .*name the field with --data\.text-field meta\.text"
        ):
            find_files(str(tmp_path / "a"), text_field=wanted)


def test_a_field_with_a_point_in_its_name_is_that_field(tmp_path: Path) -> None:
    rows = [{"meta.text": "flat", "meta": {"text": "nested"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for name in ("a.parquet", "a.jsonl"):
        files = find_files(str(tmp_path / name), text_field="meta.text").files
        assert [part.text for part in Records(files, 1.0).parts("train")] == ["flat"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(["a", "b"], r"text \((a list of texts|of the type list.*)\)"), (b"a", r"text \(of the type binary\)")],
)
def test_a_field_that_holds_something_else_than_texts_is_told_with_what_it_holds(
    tmp_path: Path, value, words: str
) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": value}] * 3), tmp_path / "a.parquet")
    paths = [tmp_path / "a.parquet"]
    if isinstance(value, list):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}))
        paths.append(tmp_path / "a.jsonl")
    for path in paths:
        with pytest.raises(
            UserError, match=f"no field with texts .*{words} without texts.*write the texts to a field first"
        ):
            find_files(str(path))
