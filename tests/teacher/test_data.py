"""From files of every kind to rows of tokens."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.data import DataOptions, Rows, read_documents, read_rows, split_rows

TEXTS = ["one white whale", "two men at sea", "a ship sang home"]
PACKED, PADDED = DataOptions(seq_len=8), DataOptions(seq_len=20, pack=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """A document's tokens, its end included."""
    return lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    def make(name: str, content: Any) -> str:
        path = tmp_path / name
        if path.suffix == ".parquet" and isinstance(content, list):
            import pandas

            pandas.DataFrame(content).to_parquet(path)
        elif path.suffix == ".jsonl" and isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        elif path.suffix == ".json" and isinstance(content, list):
            path.write_text(json.dumps(content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)
        return str(path)

    return make


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def packed(documents: list[list[int]], seq_len: int) -> list[list[int]]:
    flat = [i for document in documents for i in document]
    return [flat[s : s + seq_len] for s in range(0, len(flat) - seq_len + 1, seq_len)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_records_of_every_format_pack_alike(tokenizer, ids, write, name: str) -> None:
    source = write(name, [{"text": text, "other": 1} for text in TEXTS])
    rows = read_rows(source, tokenizer, PACKED)
    assert rows.input_ids.tolist() == packed([ids(text) for text in TEXTS], 8)
    assert rows.valid is None
    assert rows.input_ids.dtype == torch.int32


def test_text_file_is_one_document(tokenizer, ids, write) -> None:
    source = write("a.txt", "\n".join(TEXTS))
    assert read_rows(source, tokenizer, PACKED).input_ids.tolist() == packed([ids("\n".join(TEXTS))], 8)
    assert list(read_documents(source, DataOptions(text_field="body"))) == [{"body": "\n".join(TEXTS)}]


def test_stdin_is_text_or_json_lines(tokenizer, ids, stdin) -> None:
    stdin("\n".join(TEXTS).encode())
    assert read_rows("-", tokenizer, PACKED).input_ids.tolist() == packed([ids("\n".join(TEXTS))], 8)
    texts = [*TEXTS[:2], "a line\u2028separator"]
    stdin("\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    assert read_rows("-", tokenizer, PACKED).input_ids.tolist() == packed([ids(text) for text in texts], 8)


def test_tokenised_column_is_taken_as_it_is(tokenizer, write) -> None:
    records = [{"input_ids": [5, 6, 7], "text": "ignored"}, {"input_ids": [8, 9, 10, 11], "text": "ignored"}]
    source = write("a.jsonl", records)
    assert read_rows(source, tokenizer, DataOptions(seq_len=3)).input_ids.tolist() == [[5, 6, 7], [8, 9, 10]]


def test_alpaca_template(tokenizer, ids, write) -> None:
    records = [
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Sing.", "input": "home", "output": "Ho."},
    ]
    rows = read_rows(write("a.json", records), tokenizer, DataOptions(seq_len=400, pack=False))
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing.\n\n### Response:\nLa."
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSing.\n\n### Input:\nhome\n\n"
        "### Response:\nHo."
    )
    found = [row[keep].tolist() for row, keep in zip(rows.input_ids, rows.valid, strict=True)]
    assert found == [ids(plain), ids(with_input)]


def test_chat_template(tiny_teacher, write) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    messages = [{"role": "user", "content": "sea?"}, {"role": "assistant", "content": "ship"}]
    source = write("a.jsonl", [{"messages": messages}] * 2)
    with pytest.raises(BadInput, match="no chat template"):
        read_rows(source, tokenizer, PACKED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    expected = tokenizer("u:sea?|a:ship|", add_special_tokens=False)["input_ids"]
    assert read_rows(source, tokenizer, DataOptions(seq_len=len(expected))).input_ids.tolist() == [expected] * 2


def test_auto_prefers_tokens_and_template_can_be_forced(tokenizer, ids, write) -> None:
    record = {"input_ids": [5] * 30, "text": "the sea", "instruction": "x", "output": "y"}
    source = write("a.jsonl", [record])
    one = DataOptions(seq_len=7)
    assert read_rows(source, tokenizer, one).input_ids[0].tolist() == [5] * 7
    forced = DataOptions(seq_len=7, template="text")
    assert read_rows(source, tokenizer, forced).input_ids[0].tolist() == ids("the sea")[:7]
    named = DataOptions(seq_len=1, text_field="output", template="text")
    assert read_rows(source, tokenizer, named).input_ids.flatten().tolist() == ids("y")


def test_one_document_a_row_is_cut_and_padded(tokenizer, ids, write) -> None:
    source = write("a.jsonl", [{"text": "sea"}, {"text": "a" * 50}])
    rows = read_rows(source, tokenizer, PADDED)
    pad = tokenizer.pad_token_id
    assert rows.input_ids.tolist() == [ids("sea") + [pad] * 16, ids("a" * 50)[:20]]
    assert rows.valid.sum(1).tolist() == [4, 20]
    assert bool(rows.valid[0, :4].all())
    assert rows.tokens == 24
    again = Rows.from_tensors(rows.to_tensors())
    assert torch.equal(again.input_ids, rows.input_ids)
    assert torch.equal(again.valid, rows.valid)


def test_samples_bound_the_rows(tokenizer, write) -> None:
    source = write("a.jsonl", [{"text": text} for text in TEXTS])
    whole = read_rows(source, tokenizer, PACKED)
    some = read_rows(source, tokenizer, DataOptions(seq_len=8, samples=3))
    assert some.input_ids.tolist() == whole.input_ids[:3].tolist()
    assert len(read_rows(source, tokenizer, DataOptions(seq_len=8, samples=100))) == len(whole)
    assert len(read_rows(source, tokenizer, DataOptions(seq_len=20, pack=False, samples=2))) == 2


def test_samples_do_not_read_the_rest(tokenizer, stdin) -> None:
    good, bad = json.dumps({"text": "sea " * 10}), "{not JSON"
    stdin(f"{good}\n{bad}\n".encode())
    assert len(read_rows("-", tokenizer, DataOptions(seq_len=8, samples=2))) == 2


def test_split_is_drawn_by_the_seed_and_loses_no_row() -> None:
    rows = Rows(torch.arange(80, dtype=torch.int32).view(20, 4), torch.ones(20, 4, dtype=torch.bool))
    train, validation = split_rows(rows, 0.25, seed=3)
    assert (len(train), len(validation)) == (15, 5)
    both = torch.cat([train.input_ids, validation.input_ids])
    assert both.sort(0).values.tolist() == rows.input_ids.tolist()
    assert train.valid.shape == (15, 4)
    again = split_rows(rows, 0.25, seed=3)
    assert torch.equal(again[1].input_ids, validation.input_ids)
    assert not torch.equal(split_rows(rows, 0.25, seed=4)[1].input_ids, validation.input_ids)


@pytest.mark.parametrize(("rows", "fraction", "expected"), [(2, 0.0, 1), (2, 0.5, 1), (3, 0.9, 2), (100, 0.001, 1)])
def test_both_sides_of_the_split_have_a_row(rows: int, fraction: float, expected: int) -> None:
    train, validation = split_rows(Rows(torch.zeros(rows, 4, dtype=torch.int32)), fraction, seed=0)
    assert len(validation) == expected
    assert len(train) == rows - expected


def test_a_single_row_cannot_be_split() -> None:
    with pytest.raises(BadInput, match="single row"):
        split_rows(Rows(torch.zeros(1, 4, dtype=torch.int32)), 0.5, seed=0)


BAD = {
    "empty text": ("a.txt", "", "fewer than the 8 tokens of one row"),
    "empty JSON lines": ("a.jsonl", "", "fewer than the 8 tokens"),
    "too short": ("a.txt", "sea", "fewer than the 8 tokens"),
    "not UTF-8": ("a.txt", b"whale \xff\xfe", r"is not UTF-8 text \(byte 6\)"),
    "binary JSON lines": ("a.jsonl", b"\xff\xfe\x00\x01", "could not be read"),
    "JSON that ends early": ("a.json", '[{"text": "se', "could not be read"),
    "JSON lines that break": ("a.jsonl", '{"text": "sea"}\n{nonsense\n', "could not be read"),
    "not Parquet": ("a.parquet", b"PAR1 no", "could not be read"),
    "no column": ("a.jsonl", [{"body": "sea"}], r"has the columns body, but .* Name the text column with --text-field"),
    "a number as text": ("a.jsonl", [{"text": 5}], "The field text holds int, not text"),
    "a null as text": ("a.jsonl", [{"text": None}], "The field text holds NoneType, not text"),
    "token id too large": ("a.jsonl", [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 100_000]}], "token id 100000, outside"),
    "token id negative": ("a.jsonl", [{"input_ids": [1, 2, 3, 4, 5, 6, 7, -1]}], "token id -1, outside"),
    "token id beyond 32 bits": (
        "a.jsonl",
        [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 2**40]}],
        "input_ids holds something other",
    ),
    "tokens that are text": ("a.jsonl", [{"input_ids": ["a", "b"]}], "input_ids holds something other"),
    "tokens that are one number": ("a.jsonl", [{"input_ids": 5}], "input_ids holds something other"),
    "chat without template": ("a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}], "no chat template"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_sentence(tokenizer, write, name: str) -> None:
    file, content, message = BAD[name]
    with pytest.raises(BadInput, match=message) as caught:
        read_rows(write(file, content), tokenizer, PACKED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "stdin holds fewer than"),
        (b'{"text": "sea"}\n{nonsense\n', "Line 2 of stdin is not JSON"),
        (b"\xff\xfe", "stdin is not UTF-8 text"),
        (b'{"text": "sea"}\n[1, 2]\n', "Line 2 of stdin"),
    ],
)
def test_bad_stdin(tokenizer, stdin, data: bytes, message: str) -> None:
    stdin(data)
    with pytest.raises(BadInput, match=message):
        read_rows("-", tokenizer, PACKED)


def test_unpacked_without_documents(tokenizer, write) -> None:
    with pytest.raises(BadInput, match="holds no documents"):
        read_rows(write("a.jsonl", [{"input_ids": []}]), tokenizer, DataOptions(seq_len=8, pack=False))


@pytest.mark.parametrize(
    "source", ["missing.txt", "./missing", "/nowhere/at/all", "some/deep/path", "word", "folder/a.jsonl"]
)
def test_missing_data(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="is not a file"):
        read_rows(source, tokenizer, PACKED)


def test_folder_as_data(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a file"):
        read_rows(str(tmp_path), tokenizer, PACKED)


def test_hub_dataset_that_is_not_there(tokenizer) -> None:
    with pytest.raises(BadInput, match=r"org/name-v1\.5 could not be read"):
        read_rows("org/name-v1.5", tokenizer, PACKED)
