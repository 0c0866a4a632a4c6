"""Gives the reader of data all kinds of good, odd and bad data, and compares what it makes of them with what is right.

    python benchmarks/reliability/data.py [--seed 0]

Each case is some files or stdin with options, and either the documents that are in it or that it must be refused. A
case ends right if its rows hold these documents, to the token, or if it ends with code 3 (2 for a wrong option) and
one line that names the file and, of a bad row, where that is. Everything runs in this process, through the mapping of
errors to exit codes that the command line uses.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from lolcats_cli.main import exit_code  # noqa: E402
from lolcats_cli.progress import Progress  # noqa: E402
from lolcats_cli.teacher.data import read_rows  # noqa: E402
from lolcats_cli.teacher.records import DataOptions  # noqa: E402

TEACHER = ROOT / "lolcats_cli" / "assets" / "teacher"
VOCAB_SIZE = json.loads((TEACHER / "config.json").read_text())["vocab_size"]
TEMPLATE = (
    "{% if tools %}[{{ tools | length }} tools]{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}|{% endfor %}"
)
BOM = b"\xef\xbb\xbf"
Record = dict[str, Any]


@dataclass
class Case:
    """`documents`: as text, or as tokens; None if it must be refused. `may_refuse`: to refuse is right as well."""

    kind: str
    files: dict[str, bytes]
    documents: list[str | list[int]] | None
    sources: list[str] = field(default_factory=list)  # the first file
    stdin: bytes | None = None
    told: dict[str, Any] = field(default_factory=dict)  # options
    may_refuse: bool = False
    names: str = ""  # what the error must name


# --- formats ---------------------------------------------------------------------------------------------------------


def lines(records: list[Record], end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def table(records: list[Record], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: list[Record]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, write_page_checksum=True)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


FORMATS: dict[str, Callable[[list[Record]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lambda records: lines(records, "\r\n\r\n"),
    ".json": lambda records: json.dumps(records).encode(),
    ".JSON": lambda records: b"\n" + json.dumps(records, indent=2).encode(),
    ".csv": lambda records: table(records, ","),
    ".tsv": lambda records: table(records, "\t"),
    ".parquet": parquet,
    "": lines,
    ".data": lambda records: json.dumps(records).encode(),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "BOM": lambda data: BOM + data,
    ".gz": gz,
    ".zst": zstd,
}
TEXTS = [
    ["one white whale", "two men at sea", "a ship"],
    [
        'she said "no", twice',
        "line one\nline two\ttab",
        "Größe \u2028 \u0085 \U0001f40b",
        ' {"text": "inner"}',
        "#",
        "'",
    ],
    ["None", "NaN", "null", "1", "1.0", "true", "2020-01-01", "=1+1", "\\N", "-"],
]


def formats() -> Iterator[Case]:
    for texts in TEXTS:
        records = [{"text": text, "other": f"{number}"} for number, text in enumerate(texts)]
        for suffix, write in FORMATS.items():
            for packing, pack in PACKINGS.items():
                data, odd = pack(write(records)), packing == "BOM" and suffix == ".parquet"
                name = f"x{suffix}{packing if packing.startswith('.') else ''}"
                yield Case("formats, packed and not, by file", {name: data}, texts, may_refuse=odd)
                told = {"format": suffix[1:]} if suffix in (".csv", ".tsv", ".parquet") else {}
                yield Case("formats, packed and not, by stdin", {}, texts, ["-"], data, told, may_refuse=odd)


def wrong_names() -> Iterator[Case]:
    records = [{"text": text, "output": "x"} for text in TEXTS[0]]
    prose = "Call me Ishmael, he said.\nSome years ago\tnever mind how long\n"
    for suffix in (".txt", ".md", ".json", ".csv", ".tsv", ".parquet", ".log", ""):
        for write in (lines, FORMATS[".json"], FORMATS[".csv"], FORMATS[".tsv"], parquet):
            yield Case("a format under the name of another", {f"x{suffix}": write(records)}, TEXTS[0], may_refuse=True)
        yield Case("a format under the name of another", {f"x{suffix}": prose.encode()}, [prose], may_refuse=True)
        for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"):
            data = lines([{"text": "Größe"}]) if suffix.startswith(".json") else "Größe\n".encode()
            yield Case("other encodings than UTF-8", {f"x{suffix}": data.decode().encode(encoding)}, None, names="x")


# --- rows ------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "sea?"}
BAD_LINES = (
    b"{nonsense", b"{", b'{"text": "a"', b'{"text": "a"} {"text": "b"}', b"[1]", b"5", b"null", b'"text"', b"NaN", b"}",
    b'{"text": "\xff"}', b'{"text": "a\x00"}', b"{'text': 'a'}", b'{"text": "a",}', b'{"text": "\\ud83d"}', b"\x00",
    b'{"text":' + b"[" * 20_000 + b"]" * 20_000 + b"}", b'{"n": ' + b"9" * 5000 + b', "text": "a"}', b"plain text",
)  # fmt: skip
BAD_RECORDS: tuple[Record, ...] = (
    {}, {"body": "a"}, {"text": None}, {"text": 5}, {"text": ["a"]}, {"text": {"a": 1}}, {"text": True},
    {"instruction": "do", "output": None}, {"instruction": None, "output": "a"},
    {"instruction": "do", "input": 3, "output": "a"},
    {"prompt": "a", "completion": None}, {"prompt": ["a"], "completion": "b"}, {"prompt": [USER], "completion": "b"},
    {"messages": []}, {"messages": None}, {"messages": "hello"}, {"messages": ["hello"]}, {"messages": USER},
    {"messages": [{"role": "user"}]}, {"messages": [{"content": "a"}]}, {"messages": [{"speaker": "a", "said": "b"}]},
    {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": 1, "content": "a"}]},
    {"messages": [{"role": "user", "content": 5}]}, {"messages": [USER, {"role": "system", "content": "late"}]},
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [USER], "tools": "{x"},
    {"messages": [USER], "tools": 3},
    {"conversations": [{"from": "bing", "value": "a"}]}, {"conversations": [{"from": "gpt", "value": None}]},
    {"conversations": [{"value": "a"}]}, {"conversations": "a"},
    {"input_ids": 5}, {"input_ids": None}, {"input_ids": ["a"]}, {"input_ids": [1.5]}, {"input_ids": [True]},
    {"input_ids": [[1]]}, {"input_ids": [-1]}, {"input_ids": [VOCAB_SIZE]}, {"input_ids": [2**40]},
    {"input_ids": [1, 2], "attention_mask": [1]}, {"input_ids": [1, 2], "attention_mask": [1, 2]},
    {"input_ids": [1, 2], "attention_mask": "11"}, {"input_ids": [1, 2], "labels": [2, 3]},
    {"input_ids": [1, 2], "labels": [1]},
)  # fmt: skip


def bad_rows() -> Iterator[Case]:
    good = [{"text": text} for text in TEXTS[0]]
    for bad in (*BAD_LINES, *BAD_RECORDS):
        raw = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
        data = lines(good[:1]) + raw + b"\n" + lines(good[1:])
        for name, given in (("x.jsonl", data), ("x.ndjson.gz", gz(data)), ("-", data)):
            files, stdin = ({}, given) if name == "-" else ({name: given}, None)
            where = f"{'stdin' if name == '-' else name}, line 2: "
            yield Case("a bad row among good ones", files, None, [name], stdin, names=where)
            yield Case("a bad row skipped", files, TEXTS[0], [name], stdin, {"on_bad_row": "skip"})
        if isinstance(bad, dict):
            listed = json.dumps([good[0], bad, *good[1:]]).encode()
            yield Case("a bad row among good ones", {"x.json": listed}, None, names="x.json, item 2: ")
            yield Case("a bad row skipped", {"x.json": listed}, TEXTS[0], told={"on_bad_row": "skip"})
    for column in ("text", "output", "prompt", "completion", "messages", "input_ids"):
        record = {"text": ["a"], "output": ["a"], "messages": [[USER]], "input_ids": [[5]]}.get(column, ["a"])[0]
        other = {"output": {"instruction": "do"}, "prompt": {"completion": "b"}, "completion": {"prompt": "a"}}.get(
            column, {}
        )
        records = [{column: value, **other} for value in (record, None, record)]
        yield Case("a null of Parquet", {"x.parquet": parquet(records)}, None, names="x.parquet, row 2: ")
    for row in (b"a", b"a,b,c", b'"a"b,c', b"\xff,b"):
        data = b"text,other\ngood,1\n" + row + b"\nlast,2\n"
        yield Case("a bad row among good ones", {"x.csv": data}, None, names="x.csv, line 3: ")
        yield Case("a bad row skipped", {"x.csv": data}, ["good", "last"], told={"on_bad_row": "skip"})


def tokens(draw: random.Random) -> Iterator[Case]:
    """input_ids with masks and labels: padding to the left, to the right, and holes."""
    for _ in range(60):
        records, right = [], []
        for _ in range(draw.randint(1, 4)):
            ids = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 12))]
            mask = [draw.randint(0, 1) for _ in ids]
            labels = [
                draw.choice((-100, token)) if real else draw.choice((-100, 7))
                for token, real in zip(ids, mask, strict=True)
            ]
            records.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "text": "not this"})
            kept = [token for token, real in zip(ids, mask, strict=True) if real]
            right += [kept] if kept else []
        suffix = draw.choice((".jsonl", ".json", ".parquet"))
        yield Case("tokens with masks and labels", {f"x{suffix}": FORMATS[suffix](records)}, right or None, names="x")


def chats() -> Iterator[Case]:
    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "ship"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"city": "Ulm"}}]}
    late = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"day": 3}}]}
    tool = [{"name": "f"}]
    asked = '<user>sea?|<assistant>[{"name": "f", "arguments": {"city": "Ulm"}}]|'
    turns = [{"from": "human", "value": "sea?"}, {"from": "gpt", "value": "ship"}]
    found: list[tuple[list[Record], list[str]]] = [
        ([{"messages": [USER, answer]}], ["<user>sea?|<assistant>ship|"]),
        ([{"messages": [system, USER]}], ["<system>Be kind.|<user>sea?|"]),
        ([{"conversations": turns}] * 2, ["<user>sea?|<assistant>ship|"] * 2),
        ([{"conversations": [USER, answer]}], ["<user>sea?|<assistant>ship|"]),
        ([{"prompt": [USER], "completion": [answer]}], ["<user>sea?|<assistant>ship|"]),
        ([{"messages": [USER, call], "tools": tool}], ["[1 tools]" + asked]),
        ([{"messages": [USER, call], "tools": json.dumps(tool)}], ["[1 tools]" + asked]),
        (
            [{"messages": [USER, call]}, {"messages": [USER, late]}],
            [asked, '<user>sea?|<assistant>[{"name": "f", "arguments": {"day": 3}}]|'],
        ),
    ]
    for records, documents in found:
        for suffix in (".jsonl", ".json", ".parquet"):
            data = FORMATS[suffix](records)
            yield Case("conversations", {f"x{suffix}": data}, documents, told={"template": "auto"})


# --- damage and names ------------------------------------------------------------------------------------------------


def damage(draw: random.Random) -> Iterator[Case]:
    texts = [f"{number} ships of {number**5} men" for number in range(40)]
    records = [{"text": text} for text in texts]
    whole = {"x.jsonl.gz": gz(lines(records)), "x.parquet": parquet(records), "x.json": FORMATS[".json"](records)}
    for name, data in [*whole.items(), ("x.jsonl.zst", zstd(lines(records)))]:
        for _ in range(25):
            cut = data[: draw.randrange(1, len(data))]
            yield Case("cut off", {name: cut}, None, names=name)
    for name in ("x.jsonl.gz", "x.parquet"):  # which have checksums
        for _ in range(60):
            data = bytearray(whole[name])
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            yield Case("a flipped bit", {name: bytes(data)}, texts, may_refuse=True)
    for _ in range(25):
        data = lines(records)
        at = draw.randrange(len(data))
        done = data[:at].count(b"\n")
        unfinished = data[:at].rpartition(b"\n")[2]
        ends = unfinished in (b"", data.split(b"\n")[done])
        right = texts[: done + 1] if unfinished and ends else texts[:done]
        yield Case("cut off", {"x.jsonl": data[:at]}, right if ends and right else None, names="x.jsonl")
    for _ in range(80):
        data = (
            draw.randbytes(draw.randint(1, 60))
            if draw.random() < 0.5
            else bytes(draw.choices(b'[]{}":,\\ \nat1', k=30))
        )
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            text = None
        yield Case(
            "noise",
            {draw.choice(("x", "x.txt", "x.jsonl", "x.csv", "x.parquet")): data},
            text and [text],
            may_refuse=True,
        )


def names() -> Iterator[Case]:
    kind, hello = "names", lines([{"text": "hello"}])
    for name in (
        "br[1].jsonl",
        "a*.jsonl",
        "a?.jsonl",
        "[!a].jsonl",
        "{a}.jsonl",
        "a b.jsonl",
        "#a.jsonl",
        "ü.jsonl",
        "a\nb.jsonl",
    ):
        others = {other: lines([{"text": "wrong"}]) for other in ("br1.jsonl", "ab.jsonl", "b.jsonl", "a.jsonl")}
        yield Case(kind, {name: hello, **others}, ["hello"])
    two = {"f/b.jsonl": lines([{"text": "b"}]), "f/a.jsonl": lines([{"text": "a"}])}
    yield Case(kind, two, ["a", "b"], ["f"])
    yield Case(kind, two, ["a", "b"], ["f/*.jsonl"])
    yield Case(kind, two, ["b", "a"], ["f/b.jsonl", "f/a.jsonl"])
    yield Case(kind, two, ["b", "in"], ["f/b.jsonl", "-"], b'{"text": "in"}')
    yield Case(kind, {**two, "f/README.md": b"x", "f/.c.jsonl": hello}, ["a", "b"], ["f"])
    for extra in ("f/c.csv", "f/c.txt", "f/deep/c.parquet"):
        yield Case(kind, {**two, extra: b"text\nx\n"}, None, ["f"], names="f")
    for missing in (
        "f/c.jsonl",
        "f/*.csv",
        "f/[a",
        "nothing",
        "a/b/c",
        "",
        "org/name",
        "a\0b.txt",
        "x" * 5000 + ".txt",
        "~no-such-user/x",
    ):
        yield Case(kind, two, None, ["f/a.jsonl", missing])
    yield Case(kind, {}, None, ["-"], None, names="stdin")
    yield Case(kind, {}, None, ["-", "-"], hello, names="stdin")
    yield Case(kind, {"x.jsonl": hello}, None, told={"subset": "en"}, names="x.jsonl")
    yield Case(kind, {"x.jsonl": hello}, None, told={"split": "test"}, names="x.jsonl")


# --- what comes of them ----------------------------------------------------------------------------------------------


def cases(seed: int) -> Iterator[Case]:
    draw = random.Random(seed)
    yield from (*formats(), *wrong_names(), *bad_rows(), *tokens(draw), *chats(), *damage(draw), *names())


def outcome(case: Case, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """How a case ended: "read", "refused", or what is wrong with it."""
    for name, data in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    given = case.sources or [next(iter(case.files))]
    sources = [name if name in ("-", "", "org/name") or name.startswith("~") else str(folder / name) for name in given]
    sys.stdin = None if case.stdin is None else io.TextIOWrapper(io.BytesIO(case.stdin))  # type: ignore[assignment]
    options = DataOptions(seq_len=1024, pack=False, **case.told)
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    try:
        rows = read_rows(sources, tokenizer, options, vocab_size=VOCAB_SIZE, progress=progress)
    except Exception as error:
        code, said = exit_code(error), str(error)
        if code not in (2, 3):
            return f"ended with {code}: {type(error).__name__}: {said[:200]}"
        if case.documents is not None and not case.may_refuse:
            return f"refused: {said[:200]}"
        if case.names not in said or "\n" in said.replace(str(folder), ""):
            return f"does not say where: {said[:200]}"
        return "refused"
    assert rows.valid is not None
    found = [row[keep].tolist() for row, keep in zip(rows.input_ids, rows.valid, strict=True)]
    if case.documents is None:
        return f"taken wrongly: {[tokenizer.decode(row) for row in found][:3]}"
    chat = case.told.get("template") is not None
    right = [one if isinstance(one, list) else encode(one, tokenizer, chat) for one in case.documents]
    if found != right:
        return f"taken wrongly: {[tokenizer.decode(row) for row in found][:3]} instead of {case.documents[:3]}"
    if case.told.get("on_bad_row") == "skip" and not any("skipped 1 bad rows" in note for note in notes):
        return "not counted"
    return "read"


def encode(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return ids if chat else [*ids, tokenizer.eos_token_id]


def run(seed: int, scratch: Path, every: int = 1) -> tuple[dict[str, Counter[str]], list[str]]:
    """By kind, how many cases ended how, of every so many; and what was wrong."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = TEMPLATE
    results: dict[str, Counter[str]] = {}
    wrong, stdin = [], sys.stdin
    for number, case in enumerate(islice(cases(seed), 0, None, every)):
        folder = scratch / str(number)
        folder.mkdir()
        found = outcome(case, tokenizer, folder)
        counter = results.setdefault(case.kind, Counter())
        if found in ("read", "refused"):
            counter[found] += 1
        else:
            counter["code 1" if "ended with 1:" in found else "taken wrongly" if "taken" in found else "other"] += 1
            wrong.append(f"{case.kind}: {case.sources or list(case.files)} {case.told}: {found}")
    sys.stdin = stdin
    return results, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-data-") as scratch:
        results, wrong = run(args.seed, Path(scratch))
    columns = ("read", "refused", "code 1", "taken wrongly", "other")
    print("| data | tried | read, right | refused | ended with 1 | taken wrongly | otherwise wrong |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, counter in [*results.items(), ("all", sum(results.values(), Counter()))]:
        cells = [sum(counter.values()), *(counter[column] for column in columns)]
        print(f"| {kind} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
