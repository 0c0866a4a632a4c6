"""Which files are read, in which format, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.teacher.records import DataOptions, find_files, read_records

AUTO = DataOptions()
RECORDS = [
    {"text": "one whale", "output": "1"},
    {"text": 'two, "men"\nat sea', "output": "2"},
    {"text": "Schiff \u2028 ü", "output": ""},
]
BOM = b"\xef\xbb\xbf"
Write = Callable[[str, Any], str]


def columns(source: str | list[str], options: DataOptions = AUTO) -> list[dict[str, Any]]:
    """The columns of all records, none of which has a fault."""
    records = list(read_records([source] if isinstance(source, str) else source, options))
    assert [record.fault for record in records] == [None] * len(records)
    return [record.columns for record in records]


def faults(source: str, options: DataOptions = AUTO) -> list[str]:
    """Of every record "ok", or where it stands and what is wrong with it."""
    found = read_records([source], options)
    return ["ok" if record.fault is None else f"{Path(record.where).name}: {record.fault}" for record in found]


def jsonl(records: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def separated(records: list[dict], delimiter: str, end: str = "\r\n") -> bytes:
    import csv

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "output"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, write_page_checksum=True)
    return sink.getvalue()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the names of tests show it


def zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.jsonl": jsonl(RECORDS),
    "b.ndjson": jsonl(RECORDS, "\r\n"),
    "c.json": json.dumps(RECORDS, indent=1).encode(),
    "d.JSON": b"\n \n" + jsonl(RECORDS, "\n\n"),
    "e.csv": separated(RECORDS, ","),
    "f.csv": separated(RECORDS, ",", "\n"),
    "g.tsv": separated(RECORDS, "\t"),
    "h.parquet": parquet(RECORDS),
    "i.jsonl": json.dumps(RECORDS).encode(),
    "j": jsonl(RECORDS),
    "k.data": json.dumps(RECORDS).encode(),
}


@pytest.mark.parametrize("packing", ["plain", "BOM", "gzip", "zstd", "gzip without suffix", "FIFO"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(write: Write, tmp_path: Path, name: str, packing: str) -> None:
    data = FORMATS[name]
    if packing == "BOM":
        data = data if name.endswith(".parquet") else BOM + data
    elif packing.startswith("gzip"):
        data, name = gz(data[:20]) + gz(data[20:]), name + (".gz" if packing == "gzip" else "")
    elif packing == "zstd":
        data, name = zstd(data[:20]) + zstd(data[20:]), name + ".zst"
    if packing == "FIFO":
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        assert columns(str(tmp_path / name)) == RECORDS
        writer.join()
    else:
        assert columns(write(name, data)) == RECORDS


@pytest.mark.parametrize("packing", [lambda data: data, gz, zstd])
@pytest.mark.parametrize("name", FORMATS)
def test_stdin_takes_every_format(stdin, name: str, packing: Callable[[bytes], bytes]) -> None:
    suffix = Path(name).suffix.lower()
    told = suffix[1:] if suffix in (".csv", ".tsv", ".parquet") else "auto"
    stdin(packing(FORMATS[name]))
    assert columns("-", DataOptions(format=told)) == RECORDS


def test_bom_on_every_line_of_stdin(stdin) -> None:
    stdin(b"".join(BOM + json.dumps(record).encode() + b"\n" for record in RECORDS))
    assert columns("-") == RECORDS


@pytest.mark.parametrize("text", ["a\nb", "{\\bf x} y", "[1] Melville: Moby-Dick", "{{ x }}", "text, more or less", ""])
@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.md", "a", "a.tex", "-"])
def test_text_is_one_record(write: Write, stdin, name: str, text: str) -> None:
    data = BOM + text.replace("\n", "\r\n").encode()
    stdin(data)
    assert columns(name if name == "-" else write(name, data)) == [{"text": text}]
    assert columns(write("x.txt", text), DataOptions(text_field="body")) == [{"body": text}]


@pytest.mark.parametrize(
    "data", [*(FORMATS[name] for name in FORMATS if name[-3:] in ("sonl", "son")), b'{"', b"[1, 2]"]
)
def test_format_text_takes_json_as_text(write: Write, stdin, data: bytes) -> None:
    stdin(data)
    text = data.decode().replace("\r\n", "\n")
    assert columns("-", DataOptions(format="text")) == [{"text": text}]
    assert columns(write("a.jsonl", data), DataOptions(format="text")) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "data", "seems"),
    [
        ("a.txt", FORMATS["a.jsonl"], "json"),
        ("a.md", FORMATS["c.json"], "json"),
        ("a.txt", b"[\n 1]", "json"),
        ("a.txt", b"[1, 2]\n[3]\n", "json"),
        ("a.txt", FORMATS["e.csv"], "csv"),
        ("a", FORMATS["e.csv"], "csv"),
        ("-", b'"prompt","completion"\nx,y\n', "csv"),
        ("a.dat", FORMATS["g.tsv"], "tsv"),
        ("-", FORMATS["g.tsv"], "tsv"),
        ("a", FORMATS["h.parquet"], "parquet"),
        ("a.txt", FORMATS["h.parquet"], "parquet"),
    ],
)
def test_what_looks_like_another_format_is_refused(write: Write, stdin, name: str, data: bytes, seems: str) -> None:
    stdin(data)
    source = name if name == "-" else write(name, data)
    with pytest.raises(BadInput, match=f"looks like {seems}, .* Pass --format {seems}, or --format text"):
        columns(source)


def test_the_file_of_exactly_that_name_is_read(write: Write) -> None:
    write("br1.jsonl", [{"text": "wrong"}])
    for name in ("br[1].jsonl", "br?.jsonl", "b*.jsonl", "what?"):
        assert columns(write(name, jsonl([{"text": name}]))) == [{"text": name}]


def test_patterns_folders_and_several_files(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("f/b.jsonl", "f/a.jsonl.gz", "f/deep/c.ndjson", "f/.hidden/d.jsonl", "f/README.md", "f/LICENSE"):
        write(name, jsonl([{"text": name}]))
    names = [["f/a.jsonl.gz"], ["f/b.jsonl"], ["f/deep/c.ndjson"]]
    read = [[record["text"]] for record in columns(str(tmp_path / "f"))]
    assert read == names
    assert [[record["text"]] for record in columns(str(tmp_path / "f" / "*.jsonl*"))] == names[:2]
    assert [[record["text"]] for record in columns(str(tmp_path / "f" / "**" / "[bc].*"))] == names[1:]
    assert [r["text"] for r in columns([str(tmp_path / "f/b.jsonl"), str(tmp_path / "f/deep")])] == [
        *names[1],
        *names[2],
    ]
    monkeypatch.chdir(tmp_path)
    assert [record["text"] for record in columns("f/b.jsonl")] == ["f/b.jsonl"]
    assert find_files("f") == ["f/a.jsonl.gz", "f/b.jsonl", "f/deep/c.ndjson"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no file of a known format"),
        (["f/README.md", "f/model.bin"], "holds no file of a known format"),
        (["f/a.csv", "f/b.jsonl"], "holds files of the formats csv and json. Name the files, or a pattern such as"),
        (["f/a.txt", "f/sub/b.jsonl"], "holds files of the formats json and text"),
    ],
)
def test_folders_that_do_not_say_what_to_read(write: Write, tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "f").mkdir()
    for name in files:
        write(name, "x")
    with pytest.raises(BadInput, match=message):
        columns(str(tmp_path / "f"))


@pytest.mark.parametrize(
    "source", ["missing.txt", "./missing", "/nowhere/at/all", "some/deep/path", "word", "folder/a.jsonl", "a/b.csv.gz"]
)
def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="is not a file"):
        columns(source)


def test_names_that_no_file_has(tmp_path: Path, write: Write) -> None:
    with pytest.raises(BadInput, match="The name of the data is empty"):
        columns("")
    with pytest.raises(BadInput, match="No file matches the pattern"):
        columns(str(tmp_path / "*.jsonl"))
    with pytest.raises(BadInput, match=r"~no-such-user/x' cannot be looked up: Could not determine home directory"):
        columns("~no-such-user/x")
    with pytest.raises(BadInput, match="cannot be looked up"):
        columns("x" * 5000 + ".jsonl")
    with pytest.raises(BadInput, match="is not a file"):  # told before the first is read
        next(read_records([write("a.jsonl", RECORDS), "missing.txt"], AUTO))


def test_a_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("a.jsonl", RECORDS)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadInput, match=r"a\.jsonl could not be read: .*Permission denied"):
        columns(source)


def test_stdin_that_is_closed_or_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="more than once"):
        columns(["-", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BadInput, match="stdin is closed"):
        columns("-")
    closed = io.TextIOWrapper(io.BytesIO(b"x"))
    closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    with pytest.raises(BadInput, match="stdin is closed"):
        columns("-")


DEEP = b'{"text":' + b"[" * 20000 + b"]" * 20000 + b"}"
LINES = {
    "not JSON": (b"{nonsense", r"This is not a JSON object in UTF-8 \(Expecting property name.*use --format text"),
    "ends early": (b'{"text": "se', r"not a JSON object in UTF-8 \(Unterminated string"),
    "two on a line": (b'{"text": "a"} {"text": "b"}', r"not a JSON object in UTF-8 \(Extra data"),
    "a list": (b"[1, 2]", "This is a list, not a JSON object"),
    "text": (b'"sea"', "This is text, not a JSON object"),
    "a number": (b"5", "This is a number, not a JSON object"),
    "a long number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not a JSON object"),
    "null": (b"null", "This is null, not a JSON object"),
    "deep": (DEEP, "maximum recursion depth exceeded"),
    "Latin-1": (
        '{"text": "Größe"}'.encode("latin-1"),
        "not a JSON object in UTF-8 .*can't decode byte 0xf6 in position 12",
    ),
    "UTF-16": ('{"text": "sea"}'.encode("utf-16-le"), "not a JSON object in UTF-8"),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_lines_are_named_and_the_others_read(write: Write, name: str) -> None:
    line, message = LINES[name]
    source = write("a.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    first, bad, last = faults(source)
    assert (first, last) == ("ok", "ok")
    assert bad.startswith("a.jsonl, line 3: ")
    assert re.search(message, bad), bad


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "se', "item 1: The JSON list breaks off here"),
        (b'[{"text": "sea"}, {"te', "item 2: The JSON list breaks off here"),
        (b'[{"text": "sea"}', "damaged after item 1"),
        (b'[{"text": "sea"},]', "item 2: The JSON list breaks off here"),
        (b'[{"text": "sea"} {"text": "b"}]', "damaged after item 1"),
        (b'[{"text": "sea"}]\n[{"text": "b"}]', "damaged after item 1"),
        (b"[" + DEEP + b"]", "item 1: The JSON list breaks off here .maximum recursion"),
        (b'[{"text": "\xff"}]', r"is not UTF-8 text \(byte 11\)"),
    ],
)
def test_damaged_lists(write: Write, stdin, data: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(read_records([write("a.json", data)], AUTO))
    stdin(data)
    with pytest.raises(BadInput, match=rf"^stdin.*{message}"):
        list(read_records(["-"], AUTO))


def test_an_item_that_is_no_object(write: Write) -> None:
    assert faults(write("a.json", '[{"text": "a"}, 5, {"text": "b"}]')) == [
        "ok",
        "a.json, item 2: This is a number, not a JSON object.",
        "ok",
    ]
    assert faults(write("b.json", "[ ]")) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"text,n\na,1\nb\nc,3\n", ["ok", "a.csv, line 3: This row has 1 fields, and the header has 2.", "ok"]),
        (b"text,n\na,1,2\n", ["a.csv, line 2: This row has 3 fields, and the header has 2."]),
        (b'text,n\n"a\nb",1\n"c"d,1\ne,2\n', ["ok", "a.csv, line 4: This row cannot be parsed", "ok"]),
        (b'text,n\na,1\n"b,2\nc,3\n', ["ok", "a.csv, line 3: This row cannot be parsed (unexpected end of data)."]),
        (b"", []),
        (b"\n\ntext\na\n\nb\n", ["ok", "ok"]),
    ],
)
def test_rows_of_csv(write: Write, data: bytes, expected: list[str]) -> None:
    found = faults(write("a.csv", data))
    assert len(found) == len(expected)
    assert all(one.startswith(other) for one, other in zip(found, expected, strict=True)), found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
def test_any_text_comes_back_from_every_format(texts: list[str]) -> None:
    records = [{"text": text, "output": ""} for text in texts]
    written = [
        jsonl(records),
        json.dumps(records, ensure_ascii=False).encode(),
        separated(records, ","),
        parquet(records),
    ]
    for name, data in zip(("a.jsonl", "a.json", "a.csv", "a.parquet"), written, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            assert columns(str(path)) == records


def test_large_fields_of_csv(write: Write) -> None:
    assert columns(write("a.csv", "text\n" + "sea " * 100_000)) == [{"text": "sea " * 100_000}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"whale \xff\xfe", r"is not UTF-8 text \(byte 6\)"),
        ("a.txt", "whale".encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
        ("a.txt", "whale".encode("utf-16-le"), "holds NUL bytes"),
        ("a.pdf", b"%PDF-1.7\n\x00\xff", "is not UTF-8 text"),
        ("a.csv", b"text,text\na,b\n", "has two columns named 'text'"),
        ("a.arrow", b"x", "is an Arrow file, which lolcats cannot read"),
        ("a.parquet", b"", "could not be read"),
        ("a.parquet", b"PAR1 no", "could not be read"),
        ("a.parquet", FORMATS["h.parquet"][:-9], "could not be read"),
        ("a.jsonl.gz", gz(jsonl(RECORDS))[:-1], "could not be read: Truncated"),
        ("a.jsonl.gz", gz(jsonl(RECORDS))[:-1] + b"\1", "could not be read"),
        ("a.jsonl.zst", zstd(jsonl(RECORDS))[:-1], "could not be read: Truncated"),
        ("a.txt.gz", gz(jsonl(RECORDS)), "looks like json"),
    ],
)
def test_files_that_cannot_be_read(write: Write, name: str, data: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        list(read_records([write(name, data)], AUTO))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_flipped_bit_of_parquet_is_taken_in(write: Write) -> None:
    rows = [{"text": f"{i} whales of {i * i} {'x' * 50}"} for i in range(20)]
    data, wrong = parquet(rows), []
    for place in range(0, len(data), 3):
        flipped = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
        try:
            found = columns(write("a.parquet", flipped))
        except BadInput:
            continue
        if found != rows and "text" in found[0]:  # in the column's name: tokenise refuses that
            wrong.append(place)
    assert not wrong


def test_columns_that_nobody_uses_do_not_matter(write: Write) -> None:
    late = [{"text": "whale", "meta": {"a": 1} if i == 11_000 else None} for i in range(11_001)]
    records = columns(write("a.jsonl", late))
    assert len(records) == 11_001
    assert {record["text"] for record in records} == {"whale"}
    strange = [{"text": "a", "meta": [{"b": 1}]}, {"text": "b", "meta": None}]
    assert columns(write("b.parquet", strange)) == [
        {"text": "a", "meta": None},
        {"text": "b", "meta": None},
    ]  # not read
    assert columns(write("c.parquet", [{"meta": 1}] * 3)) == [{"meta": None}] * 3


def test_keys_that_parquet_adds_are_taken_away(write: Write) -> None:
    calls = [
        {"messages": [{"role": "user", "content": "x", "tool_calls": None}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "Ulm"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"day": 3}}]}]},
    ]
    found = columns(write("a.parquet", calls))
    assert found[0] == {"messages": [{"role": "user", "content": "x"}]}
    assert found[1:] == calls[1:]


def test_rows_are_parsed_one_by_one(stdin) -> None:
    stdin(b'{"text": "sea"}\n{nonsense\n')
    records = read_records(["-"], AUTO)
    assert next(records).columns == {"text": "sea"}
    assert next(records).where == "stdin, line 2"


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, *args: Any, **options: Any) -> Any:
        asked.append((name, *args, options))
        return iter([{"text": "a", "messages": [{"role": "user", "name": None}], "other": {"x": None}}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(read_records(["org/name-v1.5"], DataOptions(subset="en", split="test")))
    assert asked == [("org/name-v1.5", "en", {"split": "test", "streaming": True})]
    assert found[0].where == "org/name-v1.5, row 1"
    assert found[0].columns == {"text": "a", "messages": [{"role": "user"}], "other": {"x": None}}


def test_hub_dataset_that_is_not_there() -> None:
    with pytest.raises(BadInput, match=r"org/name-v1\.5 could not be read"):
        columns("org/name-v1.5")


@pytest.mark.parametrize("options", [DataOptions(subset="en"), DataOptions(split="test")])
def test_files_have_no_subsets_and_splits(write: Write, options: DataOptions) -> None:
    with pytest.raises(UsageError, match=r"--subset and --split choose from a hub dataset, and .* is a file"):
        columns(write("a.jsonl", RECORDS), options)


def test_options_in_a_manifest() -> None:
    old = {"seq_len": 8, "pack": True, "template": "auto", "text_field": "text", "split": "train"}
    assert DataOptions(seq_len=8, first=3, samples=4).to_config() == old
    assert DataOptions(seq_len=8, format="csv", on_bad_row="skip").to_config() == old | {
        "format": "csv",
        "on_bad_row": "skip",
    }
