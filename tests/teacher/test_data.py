"""From files of every kind to rows of tokens."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from lolcats_cli.errors import BadInput
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.data import Rows, read_rows, split_rows
from lolcats_cli.teacher.records import DataOptions

TEXTS = ["one white whale", "two men at sea", "a ship sang home"]
PACKED, PADDED = DataOptions(seq_len=8), DataOptions(seq_len=20, pack=False)


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


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", PACKED, "fewer than the 8 tokens of one row"),
        ("sea", PACKED, "fewer than the 8 tokens"),
        ("sea", DataOptions(seq_len=4, first=1), "no row 1, of 4 tokens"),
        ('{"input_ids": []}', PADDED, "holds no documents"),
    ],
)
def test_too_little_data(tokenizer, write, content: str, options: DataOptions, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_rows(write("a.jsonl" if content.startswith("{") else "a.txt", content), tokenizer, options)


def test_several_sources_follow_each_other(tokenizer, ids, write, stdin) -> None:
    stdin(b'{"text": "second"}')
    sources = [write("z.jsonl", [{"text": "first"}]), "-", write("a.txt", "third")]
    rows = read_rows(sources, tokenizer, DataOptions(seq_len=1))
    assert rows.input_ids.flatten().tolist() == ids("first") + ids("second") + ids("third")


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


MIXED = '{"text": "sea"}\n{nonsense\n{"text": null}\n{"text": "ship"}\n{"input_ids": [5, 1000]}\n'


def test_bad_rows_are_named_or_skipped_and_counted(tokenizer, ids, write) -> None:
    source, notes = write("a.jsonl", MIXED), Notes()
    with pytest.raises(BadInput, match=rf"{source}, line 2: This is not a JSON object.*--on-bad-row skip\.$"):
        read_rows(source, tokenizer, PACKED)
    rows = read_rows(source, tokenizer, DataOptions(seq_len=1, on_bad_row="skip"), progress=notes)
    assert rows.input_ids.flatten().tolist() == ids("sea") + ids("ship")
    assert len(notes.notes) == 1
    assert notes.notes[0].startswith(f"{source}: skipped 3 bad rows, the first: {source}, line 2: This is not a JSON")


def test_nothing_but_bad_rows(tokenizer, write) -> None:
    with pytest.raises(
        BadInput, match=r"holds no documents, without the 2 bad rows, the first of them .*line 1: The co"
    ):
        read_rows(
            write("a.jsonl", '{"text": 1}\n{"text": 2}\n'), tokenizer, DataOptions(8, pack=False, on_bad_row="skip")
        )


@pytest.mark.parametrize(
    ("wrong", "vocab_size", "message"),
    [
        (-1, None, r"the token id -1, but the tokenizer has 259 tokens"),
        (259, None, r"the token id 259, but the tokenizer has 259 tokens"),
        (2**40, 260, r"the token id 1099511627776, but the tokenizer has"),
        (258, 258, r"the token id 258, but the model's embedding has 258 rows"),
    ],
)
def test_token_ids_that_the_model_does_not_have(tokenizer, write, wrong: int, vocab_size, message: str) -> None:
    source = write("a.jsonl", [{"input_ids": [1] * 8}, {"input_ids": [1] * 7 + [wrong]}])
    with pytest.raises(BadInput, match=rf"line 2: There is {message}"):
        read_rows(source, tokenizer, PACKED, vocab_size=vocab_size)


def test_a_text_with_a_token_that_the_model_does_not_have(tiny_teacher, write) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_tokens(["<new>"])
    source = write("a.jsonl", [{"text": "the sea and ship"}, {"text": "a <new> ship"}])
    assert len(read_rows(source, tokenizer, PACKED, vocab_size=260)) == 3
    with pytest.raises(BadInput, match=r"line 2: There is the token id 259, but the model's embedding has 259 rows"):
        read_rows(source, tokenizer, PACKED, vocab_size=259)


def test_padding_is_a_token_that_the_model_has(tiny_teacher, write) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    source = write("a.jsonl", [{"text": "sea"}])
    options = DataOptions(seq_len=8, pack=False)
    assert read_rows(source, tokenizer, options, vocab_size=260).input_ids[0, 4:].tolist() == [259] * 4
    rows = read_rows(source, tokenizer, options, vocab_size=259)
    assert rows.input_ids[0, 4:].tolist() == [tokenizer.eos_token_id] * 4
    assert rows.valid.sum().item() == 4


def test_masked_tokens_are_padding(tokenizer, write) -> None:
    records = [
        {"input_ids": [5, 6, 7, 1, 1], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [2, 2, 8, 9, 1], "attention_mask": [0, 0, 1, 1, 1]},
    ]
    source = write("a.jsonl", records)
    assert read_rows(source, tokenizer, DataOptions(seq_len=3)).input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    rows = read_rows(source, tokenizer, DataOptions(seq_len=5, pack=False))
    pad = tokenizer.pad_token_id
    assert rows.input_ids.tolist() == [[5, 6, 7, pad, pad], [8, 9, 1, pad, pad]]
    assert rows.valid.tolist() == [[True] * 3 + [False] * 2] * 2


PROMPTED = [{"prompt": "q", "completion": "yes"}, {"prompt": "why", "completion": "so"}]


def test_rows_tell_the_completion(tokenizer, ids, write) -> None:
    source = write("a.jsonl", PROMPTED)
    flat = ids("qyes") + ids("whyso")
    marks = [False, True, True, True, True] + [False] * 3 + [True] * 3
    packed_rows = read_rows(source, tokenizer, DataOptions(seq_len=5))
    assert packed_rows.input_ids.flatten().tolist() == flat[:10]
    assert packed_rows.completion.flatten().tolist() == marks[:10]
    padded = read_rows(source, tokenizer, DataOptions(seq_len=5, pack=False))
    assert padded.completion.tolist() == [marks[:5], [False] * 3 + [True] * 2]
    again = Rows.from_tensors(padded.to_tensors())
    assert torch.equal(again.completion, padded.completion)
    assert torch.equal(padded.select(torch.tensor([1])).completion, padded.completion[1:])
    assert padded.sha256() != Rows(padded.input_ids, padded.valid).sha256()


def test_rows_with_text_among_them_do_not_tell_the_completion(tokenizer, write) -> None:
    source = write("a.jsonl", [*PROMPTED, {"text": "plain"}])
    assert read_rows(source, tokenizer, DataOptions(seq_len=4)).completion is None
    assert read_rows(source, tokenizer, DataOptions(seq_len=4, samples=2)).completion is not None
    with pytest.raises(BadInput, match=r"line 3: It does not tell which of its tokens .* Plain text has no prompt"):
        read_rows(source, tokenizer, DataOptions(seq_len=4, completion=True))


def test_stored_rows_are_checked() -> None:
    good = {"input_ids": torch.zeros(2, 3, dtype=torch.int32), "completion": torch.ones(2, 3, dtype=torch.bool)}
    assert Rows.from_tensors(good).completion is good["completion"]
    for name, tensor in (
        ("input_ids", torch.zeros(2, 3)),
        ("valid", torch.ones(2, 3)),
        ("completion", torch.ones(2, 2, dtype=torch.bool)),
    ):
        with pytest.raises(BadInput, match=re.escape(f"The stored {'tokens' if name == 'input_ids' else name}")):
            Rows.from_tensors(good | {name: tensor})
