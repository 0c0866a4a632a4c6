"""What makes the command line easy to use: options on either side, groups and examples, completion, conversations."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact, NotAnArtifact
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lolcats_cli import progress
from lolcats_cli.commands._help import EXAMPLES, GROUPS
from lolcats_cli.main import COMMANDS

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


# --- options on either side ------------------------------------------------------------------------------------------


def test_config_stands_on_either_side_of_the_command(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("transfer: {window: 5, feature-dim: 7, steps: 0}")
    second.write_text("transfer: {window: 6, layers: '0'}")
    command = ["transfer", pipeline.capture, "-o", tmp_path / "t", "--config", second]
    assert invoke("--config", first, *command).code == 0
    found = Artifact.open(tmp_path / "t").config
    # The one that is nearer wins where both say something.
    assert (found["hybrid"]["window"], found["hybrid"]["feature_dim"], found["layers"]) == (6, 7, [0])


def test_a_config_file_is_checked_behind_the_command_too(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("transfer: {widnow: 5}")
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "t", "--config", tmp_path / "c.yaml")
    assert result.code == 2
    assert "transfer.widnow is not a command's option" in " ".join(result.err.split())
    (tmp_path / "c.yaml").write_text("transfer: {config: other.yaml}")
    assert invoke("transfer", pipeline.capture, "-o", tmp_path / "t", "--config", tmp_path / "c.yaml").code == 2


@pytest.mark.parametrize("place", ["front", "behind"])
def test_quiet_says_nothing_and_verbose_more_often(pipeline: SimpleNamespace, invoke, tmp_path: Path, place) -> None:
    command = ["transfer", pipeline.capture, "-o", tmp_path / "t", "--steps", "0"]

    def said(option: str) -> str:
        args = [option, *command] if place == "front" else [*command, option]
        result = invoke(*args, *(["--force"] if (tmp_path / "t").exists() else []))
        assert (result.code, result.out) == (0, f"{tmp_path / 't'}\n")
        return result.err

    assert said("-q") == ""
    assert "layer 0: mse" in said("--verbose")
    shown = progress.for_people()
    assert isinstance(shown, progress.StderrProgress) and shown.interval == 1
    invoke("--version")
    shown = progress.for_people()
    assert isinstance(shown, progress.StderrProgress) and shown.interval == 10


def test_debug_stands_behind_the_command_too(tmp_path: Path, invoke) -> None:
    with pytest.raises(NotAnArtifact, match="nothing"):
        invoke("verify", tmp_path / "nothing", "--debug")


# --- help and completion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_an_example_that_parses(name: str) -> None:
    import typer

    from lolcats_cli.main import app

    group = typer.main.get_command(app)
    for line in EXAMPLES[name]:
        program, command, *args = shlex.split(line)
        assert (program, command) == ("lolcats", name)
        group.commands[name].make_context(name, args)  # type: ignore[attr-defined]


def test_every_grouped_option_is_there() -> None:
    import typer

    from lolcats_cli.main import app

    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {param.name for command in commands for param in command.params} | {"help"}
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert set(grouped) <= known
    assert len(set(grouped)) == len(grouped)


def test_the_list_of_commands_is_not_cut_off(invoke) -> None:
    assert "..." not in invoke("--help").out.split("Commands:")[1]


def complete(line: str) -> list[str]:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_LOLCATS_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "lolcats_cli"],
        env=os.environ | words,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.split()


def test_the_shell_completes_commands_and_options() -> None:
    assert complete("lolcats tra") == ["transfer"]
    assert complete("lolcats transfer --win") == ["--window", "--windows", "--window-dropout"]


# --- an output that is the input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(("command", "kind"), [("transfer", "capture"), ("lora", "transfer"), ("merge", "lora")])
def test_the_output_is_not_the_input(
    pipeline: SimpleNamespace, invoke, command: str, kind: str, force, tmp_path
) -> None:
    source = getattr(pipeline, kind)
    link = tmp_path / "link"
    link.symlink_to(source)
    before = (source / "manifest.json").read_bytes()
    for output in (source, f"{source}/", link):
        result = invoke(command, source, "-o", output, *force)
        assert (result.code, result.out) == (2, "")
        assert "is the directory that the command reads" in result.err
    assert (source / "manifest.json").read_bytes() == before


# --- generate --------------------------------------------------------------------------------------------------------


def test_a_prompt_comes_from_stdin(pipeline: SimpleNamespace, invoke) -> None:
    command = ["generate", pipeline.student, "--max-new-tokens", "6"]
    told = invoke(*command, "--prompt", "the whale\nand a")
    assert told.code == 0
    assert invoke(*command, stdin="the whale\nand a\n") == told
    assert invoke(*command, "--prompt", "-", stdin="the whale\nand a") == told
    assert invoke("generate", "-", stdin="x").code == 2


def test_top_p_and_top_k_narrow_what_is_drawn(pipeline: SimpleNamespace, invoke) -> None:
    command = ["generate", pipeline.student, "--prompt", "the sea", "--max-new-tokens", "12"]
    likeliest = invoke(*command).out
    hot = ["--temperature", "5", "--seed", "1"]
    assert invoke(*command, *hot).out != likeliest
    assert invoke(*command, *hot, "--top-k", "1").out == likeliest
    assert invoke(*command, *hot, "--top-p", "1e-9").out == likeliest
    assert invoke(*command, "--top-k", "3").code == 2  # nothing is drawn
    assert invoke(*command, *hot, "--top-p", "0").code == 2


@pytest.fixture
def talker(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    """The teacher, with a chat template."""
    folder = tmp_path / "talker"
    folder.mkdir()
    for file in pipeline.teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def test_a_chat_has_several_turns(talker: Path, invoke) -> None:
    options = ["--max-new-tokens", "3"]
    result = invoke("generate", talker, "--chat", *options, stdin="one\n\ntwo\n")
    assert result.code == 0
    first = invoke("generate", talker, "--prompt", "u:one|a:", *options).out.removesuffix("\n")
    second = invoke("generate", talker, "--prompt", f"u:one|a:{first}|u:two|a:", *options).out
    assert result.out == f"{first}\n{second}"
    assert invoke("generate", talker, "--chat", "--prompt", "one", *options).out == f"{first}\n"


def test_a_chat_needs_a_template(pipeline: SimpleNamespace, invoke) -> None:
    result = invoke("generate", pipeline.teacher, "--chat", stdin="hello\n")
    assert result.code == 2
    assert "--chat needs a chat template" in result.err


# --- a student's tokenizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [", trust_remote_code=False", ""])
def test_a_tokenizer_loads_without_code_where_nobody_answers(
    pipeline: SimpleNamespace, tmp_path: Path, argument: str
) -> None:
    """Without the argument transformers 5.23 asks on a terminal, whatever the folder's tokenizer_config.json says: it
    reads config.json first, whose `auto_map` and `model_type` the student's model needs."""
    code = "import sys; from transformers import AutoTokenizer as T\n"
    code += f"print(T.from_pretrained({str(pipeline.student)!r}{argument})('sea').input_ids)"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = AutoTokenizer.from_pretrained(pipeline.teacher)("sea").input_ids
    asked = "Do you wish to run the custom code?" in done.stdout
    assert (done.returncode, asked, done.stdout.endswith(f"{expected}\n")) == (0, not argument, True), done.stderr
    assert not list((tmp_path / "modules").rglob("*lolcats*"))
    assert isinstance(AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=False), PreTrainedTokenizerFast)


def test_a_students_tokenizer_loads_in_silence(pipeline: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    from lolcats_cli.teacher.load import load_tokenizer

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        loaded = load_tokenizer(pipeline.student)
        quiet = list(caplog.records)
        expected = AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=False)
    finally:
        logger.removeHandler(caplog.handler)
    # transformers' own way warns of the model's type; where its logger propagates, the record is seen twice
    assert (quiet, len({record.getMessage() for record in caplog.records})) == ([], 1)
    assert (type(loaded), loaded.get_vocab()) == (type(expected), expected.get_vocab())
