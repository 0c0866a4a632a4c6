"""Makes rows of tokens from data of any kind."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lolcats_cli.errors import BadInput
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.documents import Document, RowFault, tokenise
from lolcats_cli.teacher.records import DataOptions, Record, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Attributes:
        input_ids: [N, T] int32.
        valid: [N, T] bool, False for padding; None if there is none.
        completion: [N, T] bool, True for the tokens of a completion: the answer to a prompt, or the assistant's turns.
            None if the data does not tell it for every token.
    """

    input_ids: Tensor
    valid: Tensor | None = None
    completion: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        return int(self.input_ids.numel() if self.valid is None else self.valid.sum())

    def sha256(self) -> str:
        """A hash of everything that the rows hold."""
        total = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for tensor in self.to_tensors().values():
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def select(self, index: Tensor) -> Rows:
        return Rows(**{name: tensor[index] for name, tensor in self.to_tensors().items()})

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rows:
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.dtype != torch.int32:
            raise BadInput("The stored tokens are not input_ids [N, T] of int32. Capture them again.")
        marks = {name: tensors[name] for name in ("valid", "completion") if name in tensors}
        for name, tensor in marks.items():
            if tensor.shape != ids.shape or tensor.dtype != torch.bool:
                raise BadInput(f"The stored {name} is not bool in the shape of input_ids. Capture the tokens again.")
        return cls(ids, **marks)


def read_rows(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    vocab_size: int | None = None,
    progress: Progress = Progress(),
) -> Rows:
    """Reads and tokenises `source`, and arranges the tokens in rows.

    Args:
        source: one or several of these: a file, a folder, a pattern, "-" for stdin, a hub dataset id.
        vocab_size: the number of rows in the teacher's embedding. Larger token ids cannot be used.
        progress: gets the number of bad rows that were skipped.

    Raises:
        BadInput: the data cannot be read, holds a row that cannot be used, or is too short for one row.
    """
    sources = [source] if isinstance(source, str) else list(source)
    bounds = [(max(tokenizer.get_vocab().values()) + 1, "the tokenizer has {} tokens")]
    if vocab_size is not None:
        bounds.append((vocab_size, "the model's embedding has {} rows"))
    bound = min(bounds)
    skipped: list[str] = []
    documents = _documents(read_records(sources, options), tokenizer, options, bound, skipped)
    if options.pack:
        rows = _packed(documents, options)
    else:
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        filler = next((i for i in ends if i is not None and i < bound[0]), 0)
        rows = _padded(documents, filler, options)
    if skipped:
        progress.note(f"{_name(sources)}: skipped {len(skipped)} bad rows, the first: {skipped[0]}")
    if len(rows) == 0:
        what = f"fewer than the {options.seq_len} tokens of one row" if options.pack else "no documents"
        if options.first:
            what = f"no row {options.first}, of {options.seq_len} tokens"
        left_out = f", without the {len(skipped)} bad rows, the first of them {skipped[0]}" if skipped else ""
        raise BadInput(f"{_name(sources)} holds {what}{left_out}. Pass more data, or a smaller --seq-len.")
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
    """The numbers of the rows for training and of those for validation, in order, drawn by `seed`."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held_out = min(max(1, round(fraction * rows)), rows - 1)
    return order[held_out:].sort().values, order[:held_out].sort().values


def describe_rows(splits: dict[str, Rows], source: str | Sequence[str]) -> dict[str, Any]:
    """A manifest's entry about its data: the source, and the identity of the rows."""
    path = source if isinstance(source, str) else " ".join(source)
    return {
        "path": path.encode(errors="backslashreplace").decode(),  # names of files need not be UTF-8
        "rows": {split: len(rows) for split, rows in splits.items()},
        "tokens": {split: rows.tokens for split, rows in splits.items()},
        "seq_len": next(iter(splits.values())).input_ids.shape[1],
        "tokens_sha256": {split: rows.sha256() for split, rows in splits.items()},
    }


def _documents(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    bound: tuple[int, str],
    skipped: list[str],
) -> Iterator[Document]:
    """The documents of the records that can be used. The faults of the others go to `skipped`, or are raised."""
    for record in records:
        try:
            if record.fault is not None:
                raise RowFault(record.fault)
            document = tokenise(record.columns, tokenizer, options)
            _check(document, options, *bound)
        except RowFault as fault:
            if options.on_bad_row == "error":
                hint = "Correct the row, or leave out such rows with --on-bad-row skip."
                raise BadInput(f"{record.where}: {fault} {hint}") from fault
            skipped.append(f"{record.where}: {fault}" if not skipped else "")
        else:
            yield document


def _check(document: Document, options: DataOptions, limit: int, why: str) -> None:
    wrong = [i for i in (min(document.ids, default=0), max(document.ids, default=0)) if not 0 <= i < limit]
    if wrong:
        raise RowFault(f"There is the token id {wrong[0]}, but {why.format(limit)}.")
    if options.completion and document.completion is None:
        raise RowFault(f"It does not tell which of its tokens are a completion's. {document.untold}")


def _packed(documents: Iterable[Document], options: DataOptions) -> Rows:
    first = options.first * options.seq_len  # tokens
    limit = None if options.samples is None else first + options.samples * options.seq_len
    ids, marks = array("i"), array("b")
    for document in documents:
        ids.extend(document.ids)
        marks.extend(_marks(document))
        if limit is not None and len(ids) >= limit:
            break
    rows = (min(len(ids), limit or len(ids)) - first) // options.seq_len
    kept = slice(first, first + max(rows, 0) * options.seq_len)
    shape = (-1, options.seq_len)
    tokens = torch.tensor(ids[kept], dtype=torch.int32).view(shape)
    return Rows(tokens, completion=_completion(torch.tensor(marks[kept], dtype=torch.int8).view(shape)))


def _padded(documents: Iterable[Document], filler: int, options: DataOptions) -> Rows:
    last = None if options.samples is None else options.first + options.samples
    ids, valid, marks = [], [], []
    for document in islice((document for document in documents if document.ids), options.first, last):
        row = torch.tensor(document.ids[: options.seq_len], dtype=torch.int32)
        missing = options.seq_len - len(row)
        ids.append(pad(row, (0, missing), value=filler))
        valid.append(torch.arange(options.seq_len) < len(row))
        marks.append(pad(torch.tensor(_marks(document)[: options.seq_len], dtype=torch.int8), (0, missing)))
    if not ids:
        return Rows(torch.empty(0, options.seq_len, dtype=torch.int32))
    return Rows(torch.stack(ids), torch.stack(valid), _completion(torch.stack(marks)))


UNTOLD = -1  # a token of a document that does not tell whether it is a completion's


def _marks(document: Document) -> array[int]:
    if document.completion is None:
        return array("b", [UNTOLD]) * len(document.ids)
    return array("b", document.completion)


def _completion(marks: Tensor) -> Tensor | None:
    return None if bool((marks == UNTOLD).any()) else marks.bool()


def _name(sources: Sequence[str]) -> str:
    return " ".join("stdin" if source == "-" else source for source in sources)
