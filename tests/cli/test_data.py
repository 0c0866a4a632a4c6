"""Data as it is given on the command line, and what once was taken in wrongly: each with its right value."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lolcats_formats import Artifact
from transformers import AutoTokenizer, PreTrainedTokenizerBase

OPTIONS = ("--no-pack", "--seq-len", "32", "--samples", "4")
TEXT = "hello whale and ship"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
CALLS = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
Capture = Callable[..., Any]


@pytest.fixture
def capture(invoke, tiny_teacher: Path, tmp_path: Path) -> Capture:
    """`capture(data, *options, stdin="")`: the documents of the captured rows, decoded; or the message of code 3."""

    def call(*args: object, stdin: str | bytes | None = "", teacher: Path = tiny_teacher) -> list[str] | str:
        out = tmp_path / "captured"
        shutil.rmtree(out, ignore_errors=True)
        result = invoke("capture", teacher, *args, "-o", out, stdin=stdin)
        if result.code:
            assert (result.code, result.out, out.exists()) == (3, "", False), result.err
            return result.err.splitlines()[-1]
        tokenizer, artifact = AutoTokenizer.from_pretrained(tiny_teacher), Artifact.open(out)
        rows = []
        for split in ("train", "validation"):
            tokens = artifact.load(f"tokens/{split}.safetensors")
            valid = tokens.get("valid", tokens["input_ids"] >= 0)
            rows += [ids[keep] for ids, keep in zip(tokens["input_ids"], valid, strict=True)]
        return sorted(tokenizer.decode(row) for row in rows)

    return call


@pytest.fixture
def with_template(tiny_teacher: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The tiny teacher's folder with a chat template."""

    def make(template: str) -> Path:
        folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_json_on_stdin(capture: Capture) -> None:
    expected = [f"{TEXT}</s>"] * 4
    record = json.dumps({"text": TEXT})
    for stdin in (
        lines({"text": TEXT}) * 4,
        b"\xef\xbb\xbf" + lines({"text": TEXT}).encode() * 4,
        (b"\xef\xbb\xbf" + record.encode() + b"\n") * 4,
        json.dumps([{"text": TEXT}] * 4),
        json.dumps([{"text": TEXT}] * 4, indent=2),
    ):
        assert capture("-", *OPTIONS, stdin=stdin) == expected


@pytest.mark.parametrize(("text", "options"), [('{"text": 12}', ("--format", "text")), ("{\\bf texts}\r\n", ())])
def test_text_in_braces_on_stdin(capture: Capture, text: str, options: tuple) -> None:
    found = capture("-", "--seq-len", "6", *options, stdin=text)
    rows = [text.replace("\r", "")[:6], text.replace("\r", "")[6:12]]
    assert found == sorted(rows)


def test_the_file_that_was_named(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / "br[1].jsonl").write_text(lines({"text": "right"}) * 2)
    (tmp_path / "br1.jsonl").write_text(lines({"text": "THE WRONG FILE"}) * 9)
    assert capture(tmp_path / "br[1].jsonl", *OPTIONS) == ["right</s>"] * 2
    assert (
        capture(tmp_path / "br[1].jsonl", tmp_path / "b*1.jsonl", *OPTIONS)
        == ["THE WRONG FILE</s>"] * 2 + ["right</s>"] * 2
    )
    assert "No file matches" in capture(tmp_path / "c[1].jsonl", *OPTIONS)


@pytest.mark.parametrize("name", ["x.ndjson", "x", "x.csv", "x.tsv"])
def test_formats_by_name_and_first_line(capture: Capture, tmp_path: Path, name: str) -> None:
    table = name.endswith("sv")
    (tmp_path / name).write_text("text\n" + f"{TEXT}\n" * 4 if table else lines({"text": TEXT}) * 4)
    assert capture(tmp_path / name, *OPTIONS) == [f"{TEXT}</s>"] * 4


def test_json_that_is_called_text(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(lines({"text": TEXT}) * 4)
    assert "x.txt looks like json, but its name does not say so. Pass --format json" in capture(
        tmp_path / "x.txt", *OPTIONS
    )
    assert capture(tmp_path / "x.txt", *OPTIONS, "--format", "json") == [f"{TEXT}</s>"] * 4


def test_masked_tokens_are_padding(capture: Capture, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines({"input_ids": [75, 76, 77, 1, 1], "attention_mask": [1, 1, 1, 0, 0]}) * 4)
    assert [len(row) for row in capture(tmp_path / "x.jsonl", *OPTIONS)] == [3] * 4


def test_a_null_is_not_the_word_none(capture: Capture, tmp_path: Path) -> None:
    good = {"instruction": "do it", "input": None, "output": "done"}
    data = tmp_path / "a.jsonl"
    data.write_text(lines(good, good, good | {"output": None}, good))
    assert f"{data}, line 3: The column output holds null instead of text." in capture(data, *OPTIONS)
    assert capture(data, *OPTIONS, "--on-bad-row", "skip") == ["Below is an instruction that des"] * 3


CHATS = {
    "role": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    "empty": [],
    "text": "hello",
    "keys": [{"speaker": "a", "said": "b"}],
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_that_cannot_be_rendered(capture: Capture, with_template, tmp_path: Path, name: str) -> None:
    good, data = {"messages": [{"role": "user", "content": "y"}]}, tmp_path / "c.jsonl"
    data.write_text(lines(good, good, {"messages": CHATS[name]}))
    assert f"Error: {data}, line 3: " in capture(data, *OPTIONS, teacher=with_template(STRICT))


def test_deep_json(capture: Capture, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text":' + "[" * 20000 + "]" * 20000 + "}\n")
    assert f"{data}, line 1: This is not a JSON object" in capture(data, *OPTIONS)
    assert "stdin, line 1: This is not a JSON object" in capture("-", *OPTIONS, stdin=data.read_bytes())


def test_a_column_that_changes_its_type_late(capture: Capture, tmp_path: Path) -> None:
    data = tmp_path / "late.jsonl"
    data.write_text("".join(lines({"text": str(i), "meta": {"a": 1} if i == 11000 else None}) for i in range(11001)))
    assert capture(data, "--no-pack", "--seq-len", "8", "--samples", "10999-11000") == ["10999</s>", "11000</s>"]


def test_tokens_that_the_embedding_does_not_have(capture: Capture, new_teacher, tmp_path: Path) -> None:
    teacher = new_teacher(tmp_path / "small", vocab_size=259)  # as many as its tokenizer has
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(teacher)
    data = tmp_path / "x.jsonl"
    data.write_text(lines({"text": TEXT}, {"text": "two"}))
    assert capture(data, *OPTIONS, teacher=teacher) == [f"{TEXT}</s>", "two</s>"]
    data.write_text(lines({"text": TEXT}, {"text": "a [PAD]"}))
    message = capture(data, *OPTIONS, teacher=teacher)
    assert f"{data}, line 2: There is the token id 259, but the model's embedding has 259 rows." in message


def test_surrogates_and_closed_stdin(capture: Capture) -> None:
    assert "stdin, line 1: The text is not valid Unicode" in capture("-", *OPTIONS, stdin='{"text":"a\\ud83d b"}\n')
    assert "stdin is closed" in capture("-", *OPTIONS, stdin=None)


def test_closed_stdin_where_a_path_is_expected(invoke, tmp_path: Path) -> None:
    result = invoke("transfer", "-", "-o", tmp_path / "t", stdin=None)
    assert result.code == 2
    assert "An artifact's path was expected on stdin, and nothing came" in result.err


def test_tool_calls_of_parquet(capture: Capture, with_template, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"f": {"city": "Ulm", "day": None}}]}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"f": {"city": None, "day": 3}}]}]},
    ]
    data = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    found = capture(data, "--no-pack", "--seq-len", "128", teacher=with_template(CALLS))
    assert [json.loads(row) for row in found] == [
        {"role": "assistant", "tool_calls": [{"f": {"city": "Ulm"}}]},
        {"role": "user", "content": "x", "tool_calls": [{"f": {"day": 3}}]},
    ]


def test_bad_rows_are_counted(invoke, pipeline: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text(lines({"text": TEXT * 4}, {"text": None}, {"text": TEXT * 4}, 5))
    command = ("eval", pipeline.teacher, "--data", data, "--recall", "0", "--seq-len", "32", "--json")
    assert (invoke(*command).code, invoke(*command, "--on-bad-row", "skip").code) == (3, 0)
    result = invoke(*command, "--on-bad-row", "skip")
    assert (
        f"{data}: skipped 2 bad rows, the first: {data}, line 2: The column text holds null instead of text."
        in result.err
    )
    assert json.loads(result.out)["tokens"] == 160 // 32 * 32


def test_eval_takes_a_document_a_row(invoke, pipeline: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "sea"}, {"text": "whale"}))
    (tmp_path / "b.csv").write_text("text\nship\n")
    command = ("eval", pipeline.teacher, "--recall", "0", "--seq-len", "32", "--no-pack", "--json")
    given = ("--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.csv")
    found = json.loads(invoke(*command, *given).out)
    assert (found["rows"], found["tokens"]) == (3, 4 + 6 + 5)
    config = tmp_path / "run.yaml"
    for data, rows in ((f"{tmp_path}/a.jsonl", 2), (f"[{tmp_path}/a.jsonl, {tmp_path}/b.csv]", 3)):
        config.write_text(f"eval: {{data: {data}}}\n")
        assert json.loads(invoke("--config", config, *command).out)["rows"] == rows
    (tmp_path / "c.jsonl").write_text(lines({"input_ids": [5]}))
    result = invoke(*command, "--data", tmp_path / "c.jsonl")
    assert (result.code, "No row of the data has two tokens" in result.err) == (3, True)


def test_loss_on_completions(invoke, pipeline: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text(lines({"prompt": "the ", "completion": "sea"}, {"prompt": "a ", "completion": "ship"}))
    quick = ("--steps", "1", "--grad-accum", "1", "--seq-len", "16", "--no-pack", "--loss-on", "completion", "--json")
    result = invoke("lora", pipeline.transfer, "-o", tmp_path / "l", "--data", data, *quick)
    assert result.code == 0, result.err
    assert Artifact.open(tmp_path / "l").config["loss_on"] == "completion"
    result = invoke("lora", pipeline.transfer, "-o", tmp_path / "m", *quick)
    assert (result.code, (tmp_path / "m").exists()) == (3, False)
    assert "do not tell which of them are a completion's" in result.err


def test_a_name_that_is_not_utf8(capture: Capture, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(name).write_text(lines({"text": TEXT}) * 2)
    assert capture(name, *OPTIONS) == [f"{TEXT}</s>"] * 2
    assert Artifact.open(tmp_path / "captured").data["path"] == f"{tmp_path}/\\udcff.jsonl"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "x/" * 3000])
def test_names_that_no_data_has(invoke, pipeline: SimpleNamespace, tmp_path: Path, name: str) -> None:
    for command in (("capture", pipeline.teacher, name), ("lora", pipeline.transfer, "--data", name)):
        result = invoke(*command, "-o", tmp_path / "out")
        assert (result.code, result.err.count("\n")) == (3, 1), result.err
        assert not (tmp_path / "out").exists()
