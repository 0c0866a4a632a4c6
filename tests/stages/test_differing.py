"""What differs between artifacts is told in the words of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from lolcats_formats import Artifact

from lolcats_cli.main import app
from lolcats_cli.stages.differing import in_words, say

COMMANDS = {"capture": "capture", "transfer": "transfer", "lora": "lora", "student": "merge"}
# Beside those of a plain pipeline.
MORE = {
    "capture": ("select", "keep", "stored", "logits", "store", "block_size", "batch_size", "data.subset"),
    "transfer": ("hybrid.windows", "hybrid.feature_dims", "hybrid.kept_heads.0", "hybrid.decay", "keep_softmax"),
    "lora": ("logits", "match_weight", "full_attention", "hybrid.window", "keep_softmax", "imported.sha256"),
    "student": ("keep_softmax",),
}
NO_OPTION = {"--clip"}  # always the same


def fields(value: Any, name: str) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from fields(inner, f"{name}.{key}")
    if not isinstance(value, dict):
        yield name


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_setting_has_an_option(pipeline: SimpleNamespace, kind: str) -> None:
    command = typer.main.get_command(app).commands[COMMANDS[kind]]  # type: ignore[attr-defined]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    config = Artifact.open(getattr(pipeline, kind)).config
    names = {in_words(kind, field) for field in (*fields(config, "config"), *(f"config.{x}" for x in MORE[kind]))}
    assert {name for name in names if name.startswith("--")} - options <= NO_OPTION
    assert {name for name in names if not name.startswith("--")} <= {
        "lora": {"the transfer", "the stored predictions", "the checkpoint"},
        "student": {"the transfer"},
    }.get(kind, set())


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("transfer", {"config.lr": (0.1, 1), "config.hybrid.window": (8, 16)}, "--lr is 0.1 there and 1 here; --wind"),
        ("transfer", {"config.hybrid.windows": (None, [4, 8])}, "--windows is not given there and 4,8 here"),
        (
            "transfer",
            {"config.keep_softmax": ([1], None), "config.hybrid.kept_heads": (None, {"0": [1], "2": [0, 3]}),
             "config.layers": ([0], [0, 1])},
            "--keep-softmax is 1 there and 0.1,2.0,2.3 here",
        ),
        ("transfer", {"config.hybrid.kept_heads.2": ([0], [1, 3])}, "--keep-softmax is 2.0 there and 2.1,2.3 here"),
        ("capture", {"config.samples": ([0, 9], [0, 19])}, "--samples is 0-9 there and 0-19 here"),
        ("capture", {"config.logits": (None, 8)}, "--store-logits is not given there and 8 here"),
        ("lora", {"config.train_maps": (True, False)}, "--freeze-maps is off there and on here"),
        ("student", {"config.max_shard_bytes": (5e9, 5e8)}, "--max-shard-size is 5 there and 0.5 here"),
        (
            "capture",
            {"data.tokens_sha256.train": ("a", "b"), "data.rows": (1, 2), "teacher.weights_sha256": ("a", "b")},
            "the data differs; the teacher's weights differ",
        ),
        ("lora", {"parents": ([], [1])}, "the artifact that it is made from differs"),
        ("capture", {"config.data": ({"seq_len": 3}, 1)}, '--data is {"seq_len": 3} there and 1 here'),  # forged
        ("transfer", {f"config.{x}": (1, 2) for x in "abcdefg"}, "--e is 1 there and 2 here; and 2 more"),
    ],
)  # fmt: skip
def test_what_differs(kind: str, found: dict, expected: str) -> None:
    assert expected in say(kind, found)
