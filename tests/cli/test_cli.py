"""The commands as people and scripts meet them: exit codes, one clear sentence, stdout for the result alone."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import yaml
from lolcats_formats import Artifact, ArtifactWriter, ConfigMismatch, Damaged, FormatError, NotAnArtifact
from safetensors import SafetensorError

from lolcats_cli import __version__, errors, stopping
from lolcats_cli.main import EXIT_CODES, exit_code

CAPTURE = ("--seq-len", "64", "--samples", "20")
TRANSFER = ("--window", "8", "--feature-dim", "16", "--steps", "6", "--grad-accum", "4", "--eval-steps", "3")
LORA = ("--steps", "6", "--grad-accum", "2", "--eval-steps", "3", "--lr", "1e-2", "--freeze-maps")


# --- results ---------------------------------------------------------------------------------------------------------


def stage_commands(made: SimpleNamespace) -> dict[str, tuple]:
    """What the fixture `pipeline` did from Python, as commands."""
    return {
        "capture": ("capture", made.teacher, made.text, "-o", made.capture, *CAPTURE),
        "transfer": ("transfer", made.capture, "-o", made.transfer, *TRANSFER),
        "lora": ("lora", made.transfer, "-o", made.lora, *LORA),
        "merge": ("merge", made.lora, "-o", made.student),
    }


@pytest.mark.parametrize("stage", ["capture", "transfer", "lora", "merge"])
def test_a_finished_stage_says_so_and_prints_its_path(pipeline: SimpleNamespace, invoke, stage: str) -> None:
    command = stage_commands(pipeline)[stage]
    path = command[command.index("-o") + 1]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    result = invoke(*command)
    assert (result.code, result.out) == (0, f"{path}\n")
    assert "finished" in result.err
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    document = json.loads(invoke(*command, "--json").out)
    assert (document["path"], document["id"]) == (str(path), Artifact.open(path).id)


def test_a_stage_that_runs_prints_its_path_alone(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    result = invoke(
        "transfer", "-", "-o", tmp_path / "t", "--steps", "0", "--layers", "0-1", stdin=f"{pipeline.capture}\n"
    )
    assert (result.code, result.out) == (0, f"{tmp_path / 't'}\n")
    assert "layer 1: mse" in result.err


def test_verify_and_inspect(pipeline: SimpleNamespace, invoke) -> None:
    assert invoke("verify", pipeline.student).out == f"{pipeline.student}\n"
    assert json.loads(invoke("verify", pipeline.lora, "--json").out)["kind"] == "lora"
    for path in (pipeline.capture, pipeline.transfer, pipeline.lora, pipeline.student):
        document = json.loads(invoke("inspect", path, "--json").out)
        artifact = Artifact.open(path)
        assert (document["kind"], document["id"], document["config"]) == (artifact.kind, artifact.id, artifact.config)
        assert [layer["layer"] for layer in document["layers"]] == [0, 1]
        assert [parent["id"] for parent in document["parents"]] == [parent["id"] for parent in artifact.parents]
        assert artifact.id in invoke("inspect", path).out
        layer = json.loads(invoke("inspect", path, "--layer", "1", "--json").out)
        assert layer["layer"] == 1
        listed = {(t["file"], t["tensor"]): t["shape"] for t in layer["tensors"]}
        assert listed
        for (file, tensor), shape in listed.items():
            assert list(artifact.header(file)[tensor].shape) == shape
    assert invoke("inspect", "-", stdin=f"{pipeline.lora}\n").out == invoke("inspect", pipeline.lora).out


def test_eval_as_table_and_as_json(pipeline: SimpleNamespace, invoke) -> None:
    command = ("eval", pipeline.student, "--data", pipeline.text, "--seq-len", "64", "--samples", "4")
    lines = invoke(*command).out.splitlines()
    assert lines[0].split() == ["perplexity", "nats/token", "attention", "MSE", "relative"]
    assert [line.split()[0] for line in lines[1:]] == ["both", "window", "linear"]
    document = json.loads(invoke(*command, "--json").out)
    assert document["path"] == str(pipeline.student)
    assert f"{document['results']['both']['perplexity']:.4g}" == lines[1].split()[1]
    teacher = json.loads(invoke("eval", pipeline.teacher, *command[2:], "--json").out)
    assert list(teacher["results"]) == ["both"]


def test_generate_writes_text_alone(pipeline: SimpleNamespace, invoke) -> None:
    result = invoke("generate", pipeline.lora, "--prompt", "the sea", "--max-new-tokens", "4")
    assert (result.code, result.err) == (0, f"loading {pipeline.lora}\n")
    assert result.out.endswith("\n")
    assert "the sea" not in result.out


def test_version(invoke) -> None:
    assert invoke("--version") == (0, f"lolcats {__version__}\n", "")


# --- bad input -------------------------------------------------------------------------------------------------------


def edit_manifest(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def newer(made: SimpleNamespace, root: Path) -> Path:
    folder = Path(shutil.copytree(made.transfer, root / "newer"))
    edit_manifest(folder, version="2.0")
    return folder


def unfinished(made: SimpleNamespace, root: Path) -> Path:
    settings = {"config": {}, "teacher": None, "data": None, "tool": "test"}
    artifact = Artifact.open(made.capture)
    settings |= {"config": artifact.config, "teacher": artifact.teacher, "data": artifact.data}
    ArtifactWriter.create(root / "unfinished", "capture", **settings).close()
    return root / "unfinished"


def damaged(made: SimpleNamespace, root: Path, flip: bool = True) -> Path:
    folder = Path(shutil.copytree(made.transfer, root / "damaged"))
    path = folder / "maps" / "layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if flip else data[:-1])
    return folder


def file(root: Path, name: str, content: bytes) -> Path:
    (root / name).write_bytes(content)
    return root / name


def other_teacher(made: SimpleNamespace, root: Path) -> Path:
    folder = Path(shutil.copytree(made.teacher, root / "other"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    return folder


Case = Callable[[SimpleNamespace, Path], tuple]
# name -> (arguments, exit code, what the message says); OUT is where nothing may look finished
BAD: dict[str, tuple[Case, int, str]] = {
    "missing teacher": (lambda m, t: ("capture", t / "no", m.text, "-o", t / "OUT"), 3, "is not a folder"),
    "teacher without model": (lambda m, t: ("capture", t, m.text, "-o", t / "OUT"), 3, "has no config.json"),
    "missing data": (lambda m, t: ("capture", m.teacher, t / "no.txt", "-o", t / "OUT", *CAPTURE), 3, "is not a file"),
    "empty data": (
        lambda m, t: ("capture", m.teacher, file(t, "e.txt", b""), "-o", t / "OUT", *CAPTURE),
        3,
        "fewer than",
    ),
    "empty JSON lines": (
        lambda m, t: ("capture", m.teacher, file(t, "e.jsonl", b""), "-o", t / "OUT", *CAPTURE),
        3,
        "fewer than the 64 tokens",
    ),
    "unreadable data": (
        lambda m, t: ("capture", m.teacher, file(t, "e.txt", b"\xff\xfe"), "-o", t / "OUT", *CAPTURE),
        3,
        "is not UTF-8 text",
    ),
    "empty stdin as data": (lambda m, t: ("capture", m.teacher, "-", "-o", t / "OUT", *CAPTURE), 3, "stdin holds"),
    "sequence over the limit": (
        lambda m, t: ("capture", m.teacher, m.text, "-o", t / "OUT", "--seq-len", "129"),
        3,
        "over the 128 tokens",
    ),
    "missing artifact": (lambda m, t: ("transfer", t / "no", "-o", t / "OUT"), 3, "does not exist"),
    "no artifact": (lambda m, t: ("transfer", t, "-o", t / "OUT"), 3, "is not an artifact: it has no manifest.json"),
    "model folder": (lambda m, t: ("transfer", m.teacher, "-o", t / "OUT"), 3, "is a model folder and not an artifact"),
    "file": (lambda m, t: ("transfer", m.text, "-o", t / "OUT"), 3, "and an artifact is a directory"),
    "wrong kind for transfer": (lambda m, t: ("transfer", m.lora, "-o", t / "OUT"), 3, "`lolcats capture` makes one"),
    "wrong kind for lora": (lambda m, t: ("lora", m.capture, "-o", t / "OUT"), 3, "`lolcats transfer` makes one"),
    "wrong kind for merge": (lambda m, t: ("merge", m.capture, "-o", t / "OUT"), 3, "is a capture artifact"),
    "wrong kind for eval": (lambda m, t: ("eval", m.capture, "--data", m.text), 3, "is a capture artifact"),
    "wrong kind for generate": (lambda m, t: ("generate", m.capture, "--prompt", "x"), 3, "is a capture artifact"),
    "newer format": (lambda m, t: ("lora", newer(m, t), "-o", t / "OUT"), 3, "version"),
    "unfinished": (lambda m, t: ("transfer", unfinished(m, t), "-o", t / "OUT"), 3, "is not finished"),
    "unfinished for eval": (lambda m, t: ("eval", unfinished(m, t), "--data", m.text), 3, "is not finished"),
    "missing model": (lambda m, t: ("eval", t / "no", "--data", m.text), 3, "is not a folder"),
    "empty prompt": (lambda m, t: ("generate", m.teacher, "--prompt", ""), 2, "The prompt is empty"),
    "stdin twice": (lambda m, t: ("lora", "-", "-o", t / "OUT", "--data", "-"), 2, "cannot both come from stdin"),
    "flipped bit": (lambda m, t: ("lora", damaged(m, t), "-o", t / "OUT"), 3, "layer-001.safetensors is damaged"),
    "cut file": (lambda m, t: ("merge", damaged(m, t, False), "-o", t / "OUT"), 3, "layer-001.safetensors is damaged"),
    "verify finds it": (lambda m, t: ("verify", damaged(m, t)), 3, "layer-001.safetensors is damaged"),
    "other weights": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--teacher", other_teacher(m, t)),
        4,
        "is not the teacher that was captured: It differs in its weights",
    ),
    "other weights for merge": (
        lambda m, t: ("merge", m.lora, "-o", t / "OUT", "--teacher", other_teacher(m, t)),
        4,
        "differs in its weights",
    ),
    "other settings": (
        lambda m, t: ("transfer", m.capture, "-o", m.transfer, *TRANSFER, "--lr", "1"),
        4,
        "--lr is 0.02 there and 1.0 here",
    ),
    "output is a file": (lambda m, t: ("transfer", m.capture, "-o", m.text, *TRANSFER), 3, "is a file"),
    "output holds other things": (lambda m, t: ("transfer", m.capture, "-o", m.teacher, *TRANSFER), 3, "other files"),
    "output cannot be made": (lambda m, t: ("transfer", m.capture, "-o", m.text / "x", *TRANSFER), 3, "text.txt"),
    "gamma": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--gamma", "1"), 2, "--gamma 1.0 must lie between"),
    "no loss": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--mse-factor", "0"), 2, "nothing to train on"),
    "layers": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--layers", "1-x"), 2, "is not a list like 0-3,7"),
    "layers that are not there": (
        lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--layers", "2"),
        2,
        "--layers 2 names layer 2, and the teacher has 2 layers",
    ),
    "a layer that is not there": (lambda m, t: ("inspect", m.capture, "--layer", "2"), 2, "has no layer 2"),
    "nothing on stdin": (lambda m, t: ("transfer", "-", "-o", t / "OUT"), 2, "Did the command before this one fail"),
    "targets": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--targets", "c_attn"),
        2,
        "no modules named c_attn",
    ),
    "an empty target": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--targets", "q_proj,,o_proj"),
        2,
        "--targets q_proj,,o_proj is not a list of names",
    ),
    "feature size of another map": (
        lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--feature-map", "elu", "--feature-dims", "8,8"),
        2,
        "are for Hedgehog's maps. Those of elu have a head's size",
    ),
    "learning rate": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--lr", "nan"),
        2,
        "'--lr'",
    ),
    "large learning rate": (lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--lr", "1e38"), 2, "'--lr'"),
    "alpha": (lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--alpha", "inf"), 2, "inf is not a positive number"),
    "dropout": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--dropout", "nan"),
        2,
        "'--dropout'",
    ),
    "divergence": (
        lambda m, t: ("lora", m.transfer, "-o", t / "OUT", "--steps", "4", "--grad-accum", "1", "--lr", "1e6"),
        3,
        "The training diverged: the training loss is nan",
    ),
    "dtype": (lambda m, t: ("capture", m.teacher, m.text, "-o", t / "OUT", *CAPTURE, "--dtype", "fp8"), 2, "fp8"),
    "device": (
        lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--device", "tpu"),
        2,
        "--device tpu cannot be used",
    ),
    "unknown option": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--widnow", "3"), 2, "--widnow"),
    "missing option": (lambda m, t: ("transfer", m.capture), 2, "-o"),
    "not a number": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--window", "many"), 2, "--window"),
    "unknown choice": (lambda m, t: ("transfer", m.capture, "-o", t / "OUT", "--feature-map", "exp"), 2, "hedgehog"),
    "unknown command": (lambda m, t: ("distill",), 2, "distill"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(pipeline: SimpleNamespace, invoke, tmp_path: Path, name: str) -> None:
    case, code, message = BAD[name]
    result = invoke(*case(pipeline, tmp_path))
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err
    errors_said = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(errors_said) == 1
    assert result.err.splitlines()[-1] == errors_said[0]  # one sentence, and the last word
    assert message in errors_said[0]
    assert "bug" not in errors_said[0]
    assert not (tmp_path / "OUT" / "manifest.json").exists()


def test_disk_is_too_small(pipeline: SimpleNamespace, invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1))
    result = invoke("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", *CAPTURE)
    assert (result.code, result.out) == (5, "")
    assert "No store fits" in result.err
    assert "the disk has 1 B. Use fewer --samples, or a larger disk." in result.err
    result = invoke("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", *CAPTURE, "--store", "attention")
    assert (result.code, result.out) == (5, "")
    assert "its disk has 1 B free" in result.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        *(
            (stage, kind)
            for stage in ("capture", "transfer", "merge")
            for kind in (errno.ENOSPC, errno.EDQUOT, "memory")
        ),
        ("lora", errno.ENOSPC),
    ],
)
def test_disk_or_memory_is_full_on_the_way(
    pipeline: SimpleNamespace, invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kind: object
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError if kind == "memory" else OSError(kind, os.strerror(int(str(kind))), "somewhere")

    command = list(stage_commands(pipeline)[stage])
    command[command.index("-o") + 1] = tmp_path / "OUT"
    monkeypatch.setattr(ArtifactWriter, "save", full)
    result = invoke(*command)
    assert (result.code, result.out) == (5, "")
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "OUT" / "manifest.json").exists()


# --- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LolcatsError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.BadInput("x"), 3),
        (errors.IdentityMismatch("x"), 4),
        (errors.NotEnoughSpace("x"), 5),
        (FormatError("x"), 3),
        (NotAnArtifact("x"), 3),
        (Damaged("x"), 3),
        (ConfigMismatch("x", ["config.lr"]), 4),
        (OSError(errno.ENOSPC, "x"), 5),
        (OSError(errno.EDQUOT, "x"), 5),
        (MemoryError(), 5),
        (FileNotFoundError(errno.ENOENT, "x"), 3),
        (PermissionError(errno.EACCES, "x"), 3),
        (OSError(errno.ENAMETOOLONG, "x"), 3),
        (OSError(errno.ELOOP, "x"), 3),
        (OSError("no number: a library's own"), 1),
        (OSError(errno.EFBIG, "x"), 5),
        (OSError(errno.EMFILE, "x"), 5),
        (OSError(errno.ENOMEM, "x"), 5),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 5),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), 5),
        (SafetensorError("Error while deserializing header: invalid"), 1),
        (RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0"), 5),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), 5),
        (RuntimeError("basic_ios::clear: iostream error"), 5),
        (RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"), 1),
        (ImportError("libtorch.so: cannot open shared object file: Too many open files"), 5),
        (KeyError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code
    assert f"{code} " in EXIT_CODES


def test_what_an_error_came_of_counts() -> None:
    """Libraries, and we, make errors of errors."""
    for lack in (OSError(errno.ENOSPC, "x"), MemoryError(), SafetensorError("No space left on device")):
        with pytest.raises(errors.BadInput) as caught:
            try:
                raise lack
            except Exception as error:
                raise errors.BadInput("The model cannot be loaded.") from error
        assert exit_code(caught.value) == 5
    error = errors.BadInput("x")
    error.__cause__ = error
    assert exit_code(error) == 3


def test_memory_of_torch_is_memory() -> None:
    import torch

    assert exit_code(torch.cuda.OutOfMemoryError("x")) == 5
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert exit_code(caught.value) == 5
    assert exit_code(RuntimeError("x")) == 1


def test_memory_that_ends_while_loading(
    pipeline: SimpleNamespace, invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    assert invoke("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "OUT", *CAPTURE).code == 5


def test_the_codes_are_documented(invoke) -> None:
    page = (Path(__file__).parents[2] / "docs" / "artifacts.md").read_text()
    section = page.split("## Exit codes", 1)[1]
    shown = " ".join(invoke("--help").out.split())
    for code in (0, 1, 2, 3, 4, 5, 75):
        assert f"{code}" in section.split("\n## ", 1)[0]
        assert f"{code} " in shown
    assert errors.Stopped.exit_code == 75


def test_a_bug_says_so_and_debug_shows_where(
    pipeline: SimpleNamespace, invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("weights")

    monkeypatch.setattr("lolcats_cli.artifacts.describe.describe", broken)
    result = invoke("inspect", pipeline.lora)
    assert (result.code, result.out) == (1, "")
    assert "bug in lolcats" in result.err
    assert "Traceback" not in result.err
    with pytest.raises(KeyError):
        invoke("--debug", "inspect", pipeline.lora)


# --- signals ---------------------------------------------------------------------------------------------------------

STOPPABLE = {
    "capture": "lolcats_cli.stages.units.UnitRecord.add",
    "transfer": "lolcats_cli.stages.layer_training.layer_loss",
    "lora": "transformers.Trainer.training_step",
    "merge": "lolcats_cli.stages.merge._Plan.load",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STOPPABLE)
def test_stopped_in_the_middle_and_resumed(
    pipeline: SimpleNamespace,
    invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    number: signal.Signals,
) -> None:
    command = list(stage_commands(pipeline)[stage])
    whole = command[command.index("-o") + 1]
    command[command.index("-o") + 1] = tmp_path / "OUT"
    function = resolve_name(STOPPABLE[stage])

    def signalled(*args: object) -> object:
        if not stopping.requested():
            signal.raise_signal(number)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(STOPPABLE[stage], signalled)
        result = invoke(*command)
    assert (result.code, result.out) == (75, "")
    said = result.err.splitlines()[-1]
    assert said == f"Stopped by {number.name}. The same command resumes: {shlex.join(['lolcats', *map(str, command)])}"
    assert "Traceback" not in result.err
    assert not (tmp_path / "OUT" / "manifest.json").exists()
    if stage in ("transfer", "lora"):  # in the middle of a file
        assert json.loads((tmp_path / "OUT" / "progress.json").read_text())["checkpoint"]["folder"]
    if number == signal.SIGTERM:
        assert invoke(*command)[:2] == (0, f"{tmp_path / 'OUT'}\n")
        assert Artifact.open(tmp_path / "OUT").id == Artifact.open(whole).id


# --- configuration file ----------------------------------------------------------------------------------------------


def write_config(root: Path, content: object) -> Path:
    path = root / "lolcats.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_command_line_wins_over_file_wins_over_defaults(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"transfer": {"window": 5, "feature-dim": 7, "steps": 0}, "lora": {"rank": 3}})
    result = invoke("--config", config, "transfer", pipeline.capture, "-o", tmp_path / "t", "--window", "9")
    assert result.code == 0
    found = Artifact.open(tmp_path / "t").config
    assert (found["hybrid"]["window"], found["hybrid"]["feature_dim"], found["steps"]) == (9, 7, 0)
    assert found["grad_accum"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"transfer": {"widnow": 5}}, "transfer.widnow is not a command's option"),
        ({"distill": {"window": 5}}, "distill is not a command's option"),
        ({"transfer": {"capture": "x"}}, "transfer.capture is not a command's option"),
        ({"transfer": {"window": "many"}}, "'--window'"),
        ({"transfer": {"window": -1}}, "'--window'"),
        ({"transfer": 5}, "must hold options by command"),
        ("[1, 2]", "must hold options by command"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_configuration(pipeline: SimpleNamespace, invoke, tmp_path: Path, content: object, message: str) -> None:
    config = write_config(tmp_path, content)
    result = invoke("--config", config, "transfer", pipeline.capture, "-o", tmp_path / "OUT")
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not (tmp_path / "OUT").exists()


def test_missing_configuration(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    result = invoke("--config", tmp_path / "no.yaml", "transfer", pipeline.capture, "-o", tmp_path / "OUT")
    assert result.code == 2
    assert "no.yaml" in result.err


# --- resume and force ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STOPPABLE)
def test_resume_and_force(pipeline: SimpleNamespace, invoke, tmp_path: Path, stage: str) -> None:
    command = list(stage_commands(pipeline)[stage])
    out = tmp_path / "OUT"
    command[command.index("-o") + 1] = out
    changes = {"merge": ["--max-shard-size", "0.5"], "lora": ["--lr", "2e-2"]}
    change = changes.get(stage, ["--seed", "1"])
    result = invoke(*command, "--resume", "required")
    assert (result.code, result.out) == (3, "")
    assert "nothing to resume" in result.err
    assert not out.exists()
    assert invoke(*command, "--resume", "never").code == 0
    first = Artifact.open(out)
    assert invoke(*command, "--resume", "required").code == 0
    result = invoke(*command, *change)
    assert (result.code, "--force" in result.err) == (4, True)
    assert invoke(*command, *change, "--force").code == 0
    second = Artifact.open(out)
    second.verify()
    assert second.id != first.id
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


def test_never_resume_what_is_unfinished(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    command = list(stage_commands(pipeline)["merge"])
    command[command.index("-o") + 1] = tmp_path / "OUT"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lolcats_cli.stages.merge._write_model_files", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert invoke(*command).code == 75
    result = invoke(*command, "--resume", "never")
    assert (result.code, result.out) == (3, "")
    assert "is unfinished" in result.err
    assert invoke(*command, "--resume", "never", "--force").code == 0


# --- join and lineage ------------------------------------------------------------------------------------------------


def test_join_on_the_command_line(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    for name, rows in (("a", "0-7"), ("b", "8-19")):
        command = ("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / name, "--seq-len", 64)
        assert invoke(*command, "--samples", rows).code == 0
    result = invoke("join", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")
    assert result[:2] == (0, f"{tmp_path / 'c'}\n")
    assert Artifact.open(tmp_path / "c").id == Artifact.open(pipeline.capture).id
    result = invoke("join", tmp_path / "a", tmp_path / "a", "-o", tmp_path / "d")
    assert (result.code, result.out) == (4, "")
    assert "Rows 0 to 7 are in " in result.err


@pytest.mark.parametrize("samples", ["1", "5-5", "7-3", "-3", "a-b", "1-2-3"])
def test_rows_that_are_no_range(pipeline: SimpleNamespace, invoke, tmp_path: Path, samples: str) -> None:
    result = invoke("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", f"--samples={samples}")
    assert (result.code, result.out) == (2, "")
    assert "--samples" in result.err
    assert not (tmp_path / "c").exists()


def test_lineage_is_shown_whole_when_nothing_of_it_is_at_hand(
    pipeline: SimpleNamespace, invoke, tmp_path: Path
) -> None:
    copy = shutil.copytree(pipeline.student, tmp_path / "copy")
    result = invoke("inspect", copy, "--lineage", "--json")
    lineage = json.loads(result.out)["lineage"]
    assert [entry["kind"] for entry in lineage] == ["student", "lora", "transfer", "capture"]
    expected = [Artifact.open(getattr(pipeline, name)).id for name in ("student", "lora", "transfer", "capture")]
    assert [entry["id"] for entry in lineage] == expected
    assert all(entry["here"] for entry in lineage)
    manifest = json.loads((copy / "manifest.json").read_text().replace(str(pipeline.lora.parent), "/not/here"))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = invoke("inspect", copy, "--lineage")
    assert (result.code, [line.split()[-1] for line in result.out.splitlines()[2:6]]) == (0, ["yes"] + 3 * ["no"])
