"""From text, JSON, Parquet or a hub dataset to rows of tokens."""

from __future__ import annotations

import hashlib
import io
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lolcats_cli.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FILES = (*BUILDERS, ".txt", ".text", ".md")  # a missing one is no hub dataset, whose names may have dots too
# The prompts of Stanford Alpaca, on which the published students were trained.
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)


@dataclass(frozen=True)
class DataOptions:
    """How data becomes rows.

    Attributes:
        seq_len: tokens per row.
        pack: concatenate documents and cut (the remainder is dropped); otherwise one document per row, cut or padded.
        template: "auto", "text", "alpaca" or "chat"; "auto" goes by the columns.
        text_field: the column that "text" reads.
        split: the split of a hub dataset.
        first: the first row to take; those before it are left out.
        samples: the most rows to take.
    """

    seq_len: int = 1024
    pack: bool = True
    template: str = "auto"
    text_field: str = "text"
    split: str = "train"
    first: int = 0
    samples: int | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of tokens: `input_ids` [N, T] int32 and, if any are padded, `valid` [N, T] bool."""

    input_ids: Tensor
    valid: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        return int(self.input_ids.numel() if self.valid is None else self.valid.sum())

    def sha256(self) -> str:
        """What the rows hold, as a hash."""
        total = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for tensor in self.to_tensors().values():
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def select(self, index: Tensor) -> Rows:
        return Rows(self.input_ids[index], None if self.valid is None else self.valid[index])

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"input_ids": self.input_ids}
        return tensors if self.valid is None else {**tensors, "valid": self.valid}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rows:
        ids, valid = tensors.get("input_ids"), tensors.get("valid")
        if ids is None or ids.dim() != 2 or ids.dtype != torch.int32:
            raise BadInput("The stored tokens are not input_ids [N, T] of int32. Capture them again.")
        if valid is not None and (valid.shape != ids.shape or valid.dtype != torch.bool):
            raise BadInput("The stored valid is not of the shape of input_ids, bool. Capture the tokens again.")
        return cls(ids, valid)


def read_rows(source: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Rows:
    """Read `source` (a file, "-" for stdin, or a hub dataset id), tokenise and lay out in rows.

    Raises:
        BadInput: the data cannot be read, has no usable column, or is too short for one row.
    """
    documents = (_tokenise(document, tokenizer, options) for document in read_documents(source, options))
    rows = _packed(documents, options) if options.pack else _padded(documents, tokenizer, options)
    if len(rows) == 0:
        what = f"fewer than the {options.seq_len} tokens of one row" if options.pack else "no documents"
        if options.first:
            what = f"no row {options.first}, of {options.seq_len} tokens"
        raise BadInput(f"{_name(source)} holds {what}. Pass more data, or a smaller --seq-len.")
    bottom, top = int(rows.input_ids.min()), int(rows.input_ids.max())
    if bottom < 0 or top >= len(tokenizer):
        wrong = bottom if bottom < 0 else top
        raise BadInput(f"{_name(source)} holds the token id {wrong}, outside the tokenizer's {len(tokenizer)}.")
    return rows


def split_rows(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows. Raises `BadInput` if there are fewer than two rows."""
    if len(rows) < 2:
        raise BadInput(
            "The data gives a single row, and training needs one for validation too. "
            "Pass more data, or a smaller --seq-len."
        )
    train, validation = split_numbers(len(rows), fraction, seed)
    return rows.select(train), rows.select(validation)


def split_numbers(rows: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which of so many rows are for training and which for validation, in order, drawn by `seed`."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held_out = min(max(1, round(fraction * rows)), rows - 1)
    return order[held_out:].sort().values, order[:held_out].sort().values


def describe_rows(splits: dict[str, Rows], source: str) -> dict[str, Any]:
    """What a manifest says of its data: where it came from, and what makes it itself."""
    return {
        "path": source,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "tokens": {split: rows.tokens for split, rows in splits.items()},
        "seq_len": next(iter(splits.values())).input_ids.shape[1],
        "tokens_sha256": {split: rows.sha256() for split, rows in splits.items()},
    }


def read_documents(source: str, options: DataOptions) -> Iterator[dict[str, Any]]:
    """The records of `source`; a text file is one record with the field `options.text_field`."""
    path = Path(source).expanduser()
    try:
        if source == "-":
            yield from _stdin_records(options)
        elif path.suffix.lower() in BUILDERS and path.is_file():
            yield from _dataset(BUILDERS[path.suffix.lower()], data_files=str(path), split="train")
        elif path.is_file():
            yield {options.text_field: path.read_text(encoding="utf-8")}
        elif (
            path.exists()
            or path.suffix.lower() in FILES
            or source.count("/") != 1
            or source.startswith((".", "/", "~"))
        ):
            raise BadInput(f"The data {source} is not a file. Pass a file, - for stdin, or a hub dataset id.")
        else:
            yield from _dataset(source, split=options.split)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{_name(source)} is not UTF-8 text (byte {error.start}). Convert it, or pass JSON or Parquet."
        ) from error
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{_name(source)} could not be read: {_reason(error)}") from error


def _dataset(path: str, **options: Any) -> Iterable[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, streaming=True, **options)
    except StopIteration:  # an empty file
        return []


def _stdin_records(options: DataOptions) -> Iterator[dict[str, Any]]:
    import json

    text = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    if not text.lstrip().startswith("{"):
        yield {options.text_field: text}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise BadInput(f"Line {number} of stdin is not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise BadInput(f"Line {number} of stdin is not a JSON object.")
            yield record


def _tokenise(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[int]:
    template = _template(record, options)
    if template == "tokens":
        ids = record["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
            raise BadInput("The column input_ids holds something other than lists of token ids.")
        return ids
    if template == "chat":
        if tokenizer.chat_template is None:
            raise BadInput("The data has a chat column, but the teacher's tokenizer has no chat template.")
        return list(tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False))
    if template == "alpaca":
        given = record.get("input") or ""
        text = ALPACA.format(
            with_input=", paired with an input that provides further context" if given else "",
            instruction=record["instruction"],
            input=f"### Input:\n{given}\n\n" if given else "",
            output=record["output"],
        )
    else:
        text = record[options.text_field]
        if not isinstance(text, str):
            raise BadInput(f"The field {options.text_field} holds {type(text).__name__}, not text.")
    ids = tokenizer(text, verbose=False)["input_ids"]  # verbose: packing cuts what is longer than the model's limit
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _template(record: dict[str, Any], options: DataOptions) -> str:
    columns = {
        "tokens": {"input_ids"},
        "text": {options.text_field},
        "chat": {"messages"},
        "alpaca": {"instruction", "output"},
    }
    wanted = columns if options.template == "auto" else {options.template: columns[options.template]}
    for template, needed in wanted.items():
        if needed <= record.keys():
            return template
    raise BadInput(
        f"The data has the columns {', '.join(record) or 'none'}, but "
        f"{' or '.join(' and '.join(sorted(needed)) for needed in wanted.values())} is needed. "
        "Name the text column with --text-field."
    )


def _packed(documents: Iterable[list[int]], options: DataOptions) -> Rows:
    first = options.first * options.seq_len  # tokens
    limit = None if options.samples is None else first + options.samples * options.seq_len
    ids = array("i")
    for document in documents:
        ids.extend(document)
        if limit is not None and len(ids) >= limit:
            break
    ids = ids[first:limit]
    rows = len(ids) // options.seq_len
    tokens = torch.tensor(ids[: rows * options.seq_len], dtype=torch.int32)
    return Rows(tokens.view(rows, options.seq_len))


def _padded(documents: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Rows:
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    last = None if options.samples is None else options.first + options.samples
    ids, valid = [], []
    for document in islice((document for document in documents if document), options.first, last):
        row = torch.tensor(document[: options.seq_len], dtype=torch.int32)
        missing = options.seq_len - len(row)
        ids.append(torch.nn.functional.pad(row, (0, missing), value=pad))
        valid.append(torch.arange(options.seq_len) < len(row))
    if not ids:
        return Rows(torch.empty(0, options.seq_len, dtype=torch.int32))
    return Rows(torch.stack(ids), torch.stack(valid))


def _name(source: str) -> str:
    return "stdin" if source == "-" else source


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps the parser's own, clearer message."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
