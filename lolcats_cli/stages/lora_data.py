"""What `lora` trains on: rows of tokens, and the teacher's predictions on them where a capture stores these.

Shapes: T time, L likeliest next tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import isfile, join
from pathlib import Path

import torch
from lolcats_formats import Artifact
from safetensors import safe_open
from torch import Tensor

from lolcats_cli.artifacts.layout import LOGITS, SPLITS, Layout, tokens_name
from lolcats_cli.errors import BadInput, IdentityMismatch, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.teacher.data import Rows, read_rows, split_rows
from lolcats_cli.teacher.load import LoadOptions, load_tokenizer
from lolcats_cli.teacher.records import DataOptions


class LikeliestTokens:
    """The teacher's likeliest next tokens for rows of a capture's split, which are read one row at a time.

    Every file is checked when this is made. Raises `BadInput` if they do not hold the rows of the split.

    Attributes:
        count: L.
        path: the capture's.
    """

    def __init__(self, capture: Artifact, split: str, rows: Tensor) -> None:
        layout, self.path = Layout.of(capture.manifest), capture.path
        self.count, self._rows, self._vocab_size = layout.logits, rows, capture.teacher["vocab_size"]
        self._files: list[Path] = []
        self._starts: list[int] = []  # the number of the first row of each file
        start, wanted = 0, layout.shapes(LOGITS)
        for name in sorted(name for name in capture.files if name.startswith(f"logits/{split}-")):
            capture.check(name)
            found = {tensor: info.shape for tensor, info in capture.header(name).items()}
            count = next(iter(found.values()), (0,))[0]
            if found != {tensor: (count, *shape) for tensor, shape in wanted.items()}:
                raise BadInput(f"{capture.path / name} does not hold {self.count} next tokens. Capture it again.")
            self._files.append(capture.file(name))
            self._starts.append(start)
            start += count
        if start != len(layout.rows[split]):
            raise BadInput(
                f"{capture.path} has the next tokens of {start} {split} rows, and {len(layout.rows[split])} rows. "
                "Capture it again."
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`ids` and `log_probs` [T, L] of a row. Raises `BadInput` for values that no teacher predicts."""
        row = int(self._rows[index])
        number = bisect_right(self._starts, row) - 1
        with safe_open(self._files[number], framework="pt") as file:
            found = {name: file.get_slice(name)[row - self._starts[number]] for name in ("ids", "log_probs")}
        ids = found["ids"]
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size or not found["log_probs"].isfinite().all():
            raise BadInput(
                f"{self._files[number]} holds tokens that are not in the vocabulary, or NaN. Capture it again."
            )
        return found


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and to validate with.

    Attributes:
        source: where they come from.
        capture: the capture that they come from, if they do.
        numbers: by split, the numbers that the rows have in the capture's split, if it is a capture of this teacher.
    """

    splits: dict[str, Rows]
    source: str | Sequence[str]
    capture: Artifact | None = None
    numbers: dict[str, Tensor] | None = None

    @property
    def stored(self) -> int | None:
        """How many likeliest next tokens the capture stores for the rows; None if it stores none of this teacher."""
        if self.capture is None or self.numbers is None:
            return None
        return self.capture.config.get("logits")

    def likeliest(self) -> LikeliestTokens:
        """The teacher's stored predictions on the rows to train on."""
        assert self.capture is not None and self.numbers is not None, "predictions are stored"
        return LikeliestTokens(self.capture, "train", self.numbers["train"])


def training_data(
    parent: Artifact,
    data: str | Sequence[str] | None,
    options: DataOptions,
    folder: Path,
    load: LoadOptions,
    seed: int,
    progress: Progress,
) -> TrainingData:
    """The rows of `data`, or of the transfer's own capture; with `options.completion`, only those with a completion.

    Raises BadInput, IdentityMismatch, UsageError: the data cannot be used.
    """
    first = data if isinstance(data, str) or data is None else data[0]
    if first is None:
        capture = parent.ancestor("capture")
        data = str(capture.path)
    elif isfile(join(first, "manifest.json")):
        capture = Artifact.open(first, "capture")
        if capture.teacher["tokenizer_sha256"] != parent.teacher["tokenizer_sha256"]:
            raise IdentityMismatch(
                f"{first} holds the tokens of a tokenizer that is not the teacher's. Pass text instead."
            )
        if data not in (first, [first]):
            raise UsageError(f"--data {first} is a capture, so it must be the only data.")
    else:
        assert data is not None
        tokenizer, vocab_size = load_tokenizer(folder, load.trust_remote_code), parent.teacher["vocab_size"]
        rows = read_rows(data, tokenizer, options, vocab_size=vocab_size, progress=progress)
        rows, _ = _to_train(rows, options)
        return TrainingData(dict(zip(SPLITS, split_rows(rows, 0.05, seed), strict=True)), data)
    stored = {split: _to_train(Rows.from_tensors(capture.load(tokens_name(split))), options) for split in SPLITS}
    own = capture.teacher["weights_sha256"] == parent.teacher["weights_sha256"]  # or its predictions are another's
    return TrainingData(
        {split: rows for split, (rows, _) in stored.items()},
        data,
        capture,
        {split: numbers for split, (_, numbers) in stored.items()} if own else None,
    )


def _to_train(rows: Rows, options: DataOptions) -> tuple[Rows, Tensor]:
    """All rows, or with `options.completion` those with a completion to predict; and their numbers among `rows`."""
    if not options.completion:
        return replace(rows, completion=None), torch.arange(len(rows))
    if rows.completion is None:
        raise BadInput(
            "The captured tokens do not tell which of them are a completion's, and --loss-on completion needs that. "
            "Pass the data with --data. If a row does not tell, the error then names it."
        )
    numbers = rows.completion[:, 1:].any(1).nonzero()[:, 0]
    if not len(numbers):
        raise BadInput("No row holds a completion to predict, and --loss-on completion needs one. Pass more data.")
    return rows.select(numbers), numbers
