"""Reads data of every kind as records: finds the files, recognises their format, and gives their rows one by one.

A row that cannot be parsed becomes a record with a `fault`. The caller decides what happens to it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from lolcats_cli.errors import BadInput, UsageError, is_out_of_memory

SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",  # files that `datasets` saves; a message about them is better than to ignore them
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # the first bytes decide, and not the name
LOOK = 4096  # bytes of a first line that show what it is
BOM = b"\xef\xbb\xbf"
# The columns that some template takes (see `documents`). Those of Parquet that are not among them are not read.
COLUMNS = {
    "input_ids", "attention_mask", "labels", "messages", "conversations", "tools", "prompt", "completion",
    "instruction", "input", "output",
}  # fmt: skip


@dataclass(frozen=True)
class DataOptions:
    """How data becomes rows.

    Attributes:
        seq_len: tokens per row.
        pack: join the documents and cut them into rows (the remainder is dropped). Otherwise each row has one document,
            cut or padded.
        template: one of `documents.TEMPLATES`, or "auto", which chooses by the columns.
        text_field: the column that "text" reads.
        split: the split of a hub dataset.
        first: the number of the first row that is taken.
        samples: the largest number of rows that are taken.
        format: "auto" (by the name, else by the first line), "text", "json" (lines or a list), "csv", "tsv", "parquet".
        subset: the configuration of a hub dataset.
        on_bad_row: "error", or "skip" to leave out rows that cannot be used.
        completion: a row that does not tell which of its tokens are a completion's cannot be used.
    """

    seq_len: int = 1024
    pack: bool = True
    template: str = "auto"
    text_field: str = "text"
    split: str = "train"
    first: int = 0
    samples: int | None = None
    format: str = "auto"
    subset: str | None = None
    on_bad_row: str = "error"
    completion: bool = False

    def to_config(self) -> dict[str, Any]:
        """The options that a manifest records. The choice of rows is recorded elsewhere.

        Newer options are recorded only if they were used, so that artifacts from before keep their configuration.
        """
        new = ("format", "subset", "on_bad_row", "completion")
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("first", "samples") and (key not in new or value != getattr(DataOptions, key))
        }


@dataclass(frozen=True)
class Record:
    """A row of data: its place, for people, and its columns or its fault."""

    where: str
    columns: dict[str, Any]
    fault: str | None = None


def read_records(sources: Sequence[str], options: DataOptions) -> Iterator[Record]:
    """The records of all sources, in order: files, folders, patterns such as "*.jsonl", "-" for stdin, hub dataset ids.

    A text file is one record, with the column `options.text_field`.

    Raises:
        BadInput: a source does not exist, its format is not clear, or it cannot be read.
        UsageError: an option does not fit the source.
    """
    if list(sources).count("-") > 1:
        raise UsageError("The data has stdin (-) more than once, and stdin can be read only once.")
    for name in [name for source in sources for name in find_files(source)]:
        try:
            yield from _stdin(options) if name == "-" else _file_or_hub(name, options)
        except (BadInput, UsageError):
            raise
        except Exception as error:  # of parsers and of the hub's client
            if is_out_of_memory(error):
                raise
            raise BadInput(f"{name} could not be read: {reason(error).rstrip('.')}.") from error


def find_files(source: str) -> list[str]:
    """The files that `source` names: the file of exactly that name, those of a folder, or those that match a pattern.
    "-" and the id of a hub dataset name themselves.

    Raises BadInput if there are none, or a folder mixes formats.
    """
    if not source:
        raise BadInput("The name of the data is empty. Is a shell variable not set?")
    try:
        path = Path(source).expanduser()
        if source == "-" or (path.exists() and not path.is_dir()):
            return [source if source == "-" else str(path)]
        if path.is_dir():
            return _folder_files(path)
        matches = sorted(name for name in glob(str(path), recursive=True) if Path(name).is_file())
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a user who is not there
        raise BadInput(f"The data {source[:200]!r} cannot be looked up: {reason(error)}.") from error
    if matches:
        return matches
    if any(character in source for character in "*?["):
        raise BadInput(f"No file matches the pattern {source}.")
    if format_of(source) is not None or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(
            f"The data {source} is not a file. Pass a file, a folder, a pattern in quotes, - for stdin, or a hub "
            "dataset id."
        )
    return [source]


def format_of(name: str) -> str | None:
    """The format that the name of a file tells, behind a suffix for compression; None if it tells none."""
    path = Path(name)
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix.lower())


def _folder_files(folder: Path) -> list[str]:
    """The data files below a folder, without hidden ones and README.md. They must have one format."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        kind = format_of(path.name)
        if kind and not hidden and path.name != "README.md" and path.is_file():
            found.setdefault(kind, []).append(str(path))
    if len(found) != 1:
        what = f"files of the formats {' and '.join(sorted(found))}" if found else "no file of a known format"
        raise BadInput(f"The folder {folder} holds {what}. Name the files, or a pattern such as '{folder}/*.jsonl'.")
    return next(iter(found.values()))


def _stdin(options: DataOptions) -> Iterator[Record]:
    if sys.stdin is None or sys.stdin.closed:
        raise BadInput("The data should come from stdin (-), but stdin is closed. Name a file.")
    return _parse(_unpacked(sys.stdin.buffer), "stdin", None, options)  # type: ignore[arg-type]


def _file_or_hub(name: str, options: DataOptions) -> Iterator[Record]:
    if not Path(name).exists():
        yield from _hub(name, options)
        return
    if options.subset is not None or options.split != DataOptions.split:
        raise UsageError(f"--subset and --split choose from a hub dataset, and {name} is a file. Leave them out.")
    with open(name, "rb", buffering=0) as raw:
        yield from _parse(_unpacked(raw), name, format_of(name), options)


def _unpacked(raw: io.RawIOBase) -> io.BufferedReader:
    """The bytes, decompressed if the first of them show that they are compressed."""
    stream: io.BufferedReader = io.BufferedReader(raw, 1 << 16)
    start = stream.peek(4)
    for magic, codec in MAGIC.items():
        if start.startswith(magic):
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(stream, codec), 1 << 16)
    return stream


def _parse(stream: io.BufferedReader, name: str, by_name: str | None, options: DataOptions) -> Iterator[Record]:
    """The records of bytes whose format is `options.format`, else what the name says, else what the first line says."""
    known = by_name if options.format == "auto" else options.format
    if known == "arrow":
        raise BadInput(
            f"{name} is an Arrow file, which lolcats cannot read. Save the dataset with its to_parquet method."
        )
    if known == "parquet":
        return _parquet(stream, name, options)
    if known in ("csv", "tsv"):
        return _csv(stream, name, "," if known == "csv" else "\t")
    if known == "json":
        return _json(stream, name)
    lines: Iterable[bytes] = stream
    if options.format == "auto":
        start: list[bytes] = []  # up to the first line that is not blank
        for line in stream:
            start.append(line)
            if line.removeprefix(BOM).strip():
                break
        lines = chain(start, stream)
        seems = _seems(start[-1] if start else b"", options)
        if seems == "json" and by_name is None:
            return _json(lines, name)
        if seems:
            raise BadInput(
                f"{name} looks like {seems}, but its name does not say so. Pass --format {seems}, or --format text to "
                "read it as plain text."
            )
    return _text(lines, name, options)


def _seems(line: bytes, options: DataOptions) -> str | None:
    """The format that the first line of something without a known suffix seems to have, if not text."""
    if line.startswith(b"PAR1"):
        return "parquet"
    line = line.removeprefix(BOM).strip()
    start = line[:LOOK].decode("utf-8", errors="replace")
    if re.match(r'\{\s*(["}]|$)|\[\s*([{"]|$)', start):
        return "json"
    try:
        if line[:1] in (b"[", b"{") and json.loads(line) is not None:
            return "json"
    except (ValueError, RecursionError):
        pass
    for delimiter, kind in (("\t", "tsv"), (",", "csv")):
        fields = [field.strip().strip('"') for field in start.split(delimiter)]
        names = all(re.fullmatch(r"[\w.-]{1,40}", field) for field in fields)
        if len(fields) > 1 and names and not {*COLUMNS, options.text_field}.isdisjoint(fields):
            return kind
    return None


def _text(lines: Iterable[bytes], name: str, options: DataOptions) -> Iterator[Record]:
    try:
        text = b"".join(lines).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{name} is not UTF-8 text (byte {error.start}). Convert it, or name its format with --format."
        ) from error
    if "\0" in text:
        raise BadInput(f"{name} holds NUL bytes, so it is not UTF-8 text. Convert it.")
    yield Record(name, {options.text_field: text.replace("\r\n", "\n").replace("\r", "\n")})


def _json(lines: Iterable[bytes], name: str) -> Iterator[Record]:
    """One JSON object a line; or, if the first is no object but begins a list, the items of that."""
    numbered = enumerate(lines, 1)
    begun = False
    for number, line in numbered:
        body = line.removeprefix(BOM).strip()
        if not begun and body.startswith(b"["):
            yield from _json_list(b"".join([body, *(rest for _, rest in numbered)]), name)
            return
        if not body:
            continue
        begun, where = True, f"{name}, line {number}"
        try:
            value = json.loads(body.decode())
        except (ValueError, RecursionError) as error:
            hint = "If the whole file is plain text, use --format text."
            yield Record(where, {}, f"This is not a JSON object in UTF-8 ({reason(error)}). {hint}")
        else:
            yield _as_record(where, value)


def _json_list(data: bytes, name: str) -> Iterator[Record]:
    """The items of a JSON list, parsed one after the other."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start}). Convert it.") from error
    decoder, space, number = json.JSONDecoder(), re.compile(r"[^ \t\n\r]"), 0

    def after_space(place: int) -> int:
        found = space.search(text, place)
        return len(text) if found is None else found.start()

    end = after_space(1)
    while number > 0 or text[end : end + 1] != "]":
        number += 1
        try:
            value, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}, item {number}: The JSON list breaks off here ({reason(error)}).") from error
        yield _as_record(f"{name}, item {number}", value)
        end = after_space(end)
        if text[end : end + 1] != ",":
            break
        end = after_space(end + 1)
    if text[end : end + 1] != "]" or text[end + 1 :].strip():
        raise BadInput(f"{name}: The JSON list is damaged after item {number}, or something follows it.")


def _as_record(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, {}, f"This is {kind_of(value)}, not a JSON object.")


def _csv(stream: io.BufferedReader, name: str, delimiter: str) -> Iterator[Record]:
    """Rows under a header. Bytes that are not UTF-8 become lone surrogates, which no column that is used may hold."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{name}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(where, {}, f"This row cannot be parsed ({error}).")
            continue
        if not header:
            header = row
            _refuse_doubled(header, name)
        elif len(row) == len(header):
            yield Record(where, dict(zip(header, row, strict=True)))
        elif row:
            yield Record(where, {}, f"This row has {len(row)} fields, and the header has {len(header)}.")


def _parquet(stream: io.BufferedReader, name: str, options: DataOptions) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()), page_checksum_verification=True)
    names = file.schema_arrow.names
    _refuse_doubled(names, name)
    used = [column for column in names if column in COLUMNS or column == options.text_field]
    unread, number = dict.fromkeys(names), 0
    for batch in file.iter_batches(batch_size=256, columns=used):
        for row in batch.to_pylist():
            number += 1
            yield Record(f"{name}, row {number}", {**unread, **{key: _without_nulls(row[key]) for key in used}})
    if number != file.metadata.num_rows:
        raise BadInput(f"{name} is damaged: It holds {number} rows, and its metadata says {file.metadata.num_rows}.")


def _hub(name: str, options: DataOptions) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
    for number, row in enumerate(found, 1):
        used = {key: _without_nulls(value) for key, value in row.items() if key in COLUMNS or key == options.text_field}
        yield Record(f"{name}, row {number}", {**row, **used})


def _without_nulls(value: Any) -> Any:
    """The value without the keys that are null: Arrow gives every struct of a column all keys that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _refuse_doubled(names: list[str], where: str) -> None:
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise BadInput(f"{where} has two columns named {doubled!r}. Rename one.")


def kind_of(value: Any) -> str:
    """What a value of JSON is, for people."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def reason(error: BaseException) -> str:
    """The message of an error's innermost cause, on one line: `datasets` wraps clearer messages than its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
