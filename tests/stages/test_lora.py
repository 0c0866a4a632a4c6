"""lora: a plain PEFT adapter that lowers the loss, on top of maps that stay as they are unless asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, ConfigMismatch, Damaged, WrongKind
from lolcats_kernels.hf_attention import HybridAttention
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.training_args import ParallelMode

import lolcats_cli.stages.lora as module
from lolcats_cli.artifacts import layout
from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import BadInput, IdentityMismatch, NotEnoughSpace, Stopped, UsageError
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.loading.student import load_student
from lolcats_cli.stages import checkpoints, lora_training
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_data import LikeliestTokens
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.lora_training import arguments
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.build import as_teacher
from lolcats_cli.teacher.data import read_rows, split_rows
from lolcats_cli.teacher.load import LoadOptions, load_tokenizer
from lolcats_cli.teacher.records import DataOptions

CPU = LoadOptions(device="cpu")
QUICK = LoraOptions(train_maps=False, steps=2, grad_accum=2, eval_steps=2, lr=1e-2)
IDS = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_the_adapter_is_a_plain_peft_folder(pipeline: SimpleNamespace) -> None:
    adapter = pipeline.lora / "adapter"
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    # It goes onto the unchanged teacher too.
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pipeline.teacher), adapter)


def test_what_eval_loads_is_the_adapter_on_the_student(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.lora)
    student = load_student(artifact, pipeline.teacher, CPU)
    bare = logits(student)
    adapted = logits(PeftModel.from_pretrained(student, pipeline.lora / "adapter"))
    torch.testing.assert_close(logits(load_any(str(pipeline.lora), CPU).model), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - bare).abs().max() > 0.1


def test_the_merged_folder_is_that_too(pipeline: SimpleNamespace) -> None:
    torch.testing.assert_close(
        logits(load_any(str(pipeline.student), CPU).model), logits(load_any(str(pipeline.lora), CPU).model)
    )


def test_the_loss_falls(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.lora)
    assert artifact.summary["loss"] < artifact.summary["initial_loss"]
    validations = [event for event in artifact.metrics() if event["event"] == "validation"]
    assert [event["step"] for event in validations] == [0, 3, 6]
    assert validations[0]["loss"] == artifact.summary["initial_loss"]
    assert validations[-1]["loss"] == pytest.approx(artifact.summary["loss"], rel=1e-6)


def test_maps_stay_as_they_are_unless_asked(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    before, frozen = Artifact.open(pipeline.transfer), Artifact.open(pipeline.lora)
    trained = lora(pipeline.transfer, tmp_path / "l", options=replace(QUICK, train_maps=True), load=CPU)
    for layer in range(2):
        start, kept, moved = (a.load(maps_file(layer)) for a in (before, frozen, trained))
        assert all(torch.equal(start[name], kept[name]) for name in start)
        assert all(not torch.equal(start[name], moved[name]) for name in start)
    # The trained maps are those that eval loads.
    loaded = load_any(str(trained.path), CPU).model
    assert torch.equal(loaded.model.layers[1].self_attn.hybrid.q_weight, trained.load(maps_file(1))["q_weight"])


def test_same_seed_same_artifact(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    torch.randn(5)
    options = LoraOptions(train_maps=False, steps=6, grad_accum=2, eval_steps=3, lr=1e-2)
    assert lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU).id == Artifact.open(pipeline.lora).id


def test_as_teacher_is_the_teacher_for_a_while(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.lora)
    student = load_student(artifact, pipeline.teacher, CPU)
    model = PeftModel.from_pretrained(student, pipeline.lora / "adapter", is_trainable=True).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = logits(model)
    model.train()
    with as_teacher(model), torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    teacher = logits(AutoModelForCausalLM.from_pretrained(pipeline.teacher))
    torch.testing.assert_close(found, teacher, rtol=1e-4, atol=1e-4)
    assert (before - teacher).abs().max() > 0.1
    assert model.training
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert torch.equal(logits(model), before)


def divergence(pipeline: SimpleNamespace, artifact: Artifact, rows: torch.Tensor) -> float:
    """Mean over tokens of KL(teacher || student)."""
    with torch.no_grad():
        wanted, found = (
            load_any(str(path), CPU).model.eval()(input_ids=rows).logits[:, :-1].log_softmax(-1)
            for path in (pipeline.teacher, artifact.path)
        )
    return ((wanted.exp() * (wanted - found)).sum(-1)).mean().item()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_matching_the_teacher_lowers_the_divergence_from_it(
    pipeline: SimpleNamespace, tmp_path: Path, batch_size: int
) -> None:
    rows = Artifact.open(pipeline.capture).load("tokens/train.safetensors")["input_ids"].long()
    options = replace(QUICK, steps=9, match="teacher", schedule="linear", lr=5e-3, batch_size=batch_size)
    trained = lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    before, after = (divergence(pipeline, artifact, rows) for artifact in (Artifact.open(pipeline.transfer), trained))
    assert after < 0.9 * before


def test_the_loss_of_matching_is_the_divergence(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """That of the first step, before anything has changed, with one batch of all rows."""
    rows = Artifact.open(pipeline.capture).load("tokens/train.safetensors")["input_ids"].long()
    options = LoraOptions(steps=1, grad_accum=1, batch_size=len(rows), eval_steps=1, match="teacher")
    trained = lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    (event,) = (event for event in trained.metrics() if event["event"] == "train")
    assert event["loss"] == pytest.approx(divergence(pipeline, Artifact.open(pipeline.transfer), rows), rel=1e-3)


def predicting(
    pipeline: SimpleNamespace, folder: Path, count: int, name: str = "with-logits", **changes: object
) -> Path:
    """A capture of the pipeline's rows that stores `count` next tokens."""
    options = replace(DataOptions(seq_len=64, samples=20), **changes)
    data = str(changes.get("data", pipeline.text))
    return capture(str(pipeline.teacher), data, folder / name, options=options, store_logits=count, load=CPU).path


def test_stored_predictions_of_the_whole_vocabulary_are_the_teachers(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training as beside the teacher, up to the rounding of what is stored; and the teacher does not run."""
    given = predicting(pipeline, tmp_path, 260)
    options = replace(QUICK, match="teacher", match_weight=0.7, steps=3, lr=1e-3)
    live = lora(pipeline.transfer, tmp_path / "live", options=options, load=CPU)
    monkeypatch.setattr(lora_training, "as_teacher", lambda *_: pytest.fail("ran the teacher"))
    stored = lora(pipeline.transfer, tmp_path / "stored", options=options, data=str(given), load=CPU)
    losses = [[event["loss"] for event in made.metrics() if event["event"] == "train"] for made in (live, stored)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert (live.config.get("logits"), stored.config["logits"]) == (None, 260)
    assert stored.config["match_weight"] == 0.7


def test_predictions_of_another_teacher_are_not_taken(
    pipeline: SimpleNamespace, tmp_path: Path, new_teacher: Callable[..., Path]
) -> None:
    other = new_teacher(tmp_path / "other", seed=7)
    options = DataOptions(seq_len=64, samples=20)
    given = capture(str(other), str(pipeline.text), tmp_path / "c", options=options, store_logits=4, load=CPU).path
    made = lora(pipeline.transfer, tmp_path / "l", options=replace(QUICK, match="teacher"), data=str(given), load=CPU)
    assert "logits" not in made.config


def test_the_loss_is_shared_by_the_teacher_and_the_text(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    first = {}
    for weight in (1.0, 0.25, 0.0):
        options = LoraOptions(steps=1, grad_accum=1, batch_size=19, eval_steps=1, match="teacher", match_weight=weight)
        made = lora(pipeline.transfer, tmp_path / str(weight), options=options, load=CPU)
        first[weight] = next(event["loss"] for event in made.metrics() if event["event"] == "train")
    assert first[0.25] == pytest.approx(0.25 * first[1.0] + 0.75 * first[0.0], rel=1e-5)
    options = LoraOptions(steps=1, grad_accum=1, batch_size=19, eval_steps=1)
    text = lora(pipeline.transfer, tmp_path / "text", options=options, load=CPU)
    assert first[0.0] == pytest.approx(next(e["loss"] for e in text.metrics() if e["event"] == "train"), rel=1e-5)
    assert "match_weight" not in text.config


def test_rows_find_their_own_predictions(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """In every file, of rows that are chosen too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SHARD_BYTES", 3 * 64 * 8 * 16 * 4)
        made = Artifact.open(predicting(pipeline, tmp_path, 4))
    files = sorted(name for name in made.files if name.startswith("logits/train-"))
    assert len(files) == 7
    whole = {name: torch.cat([made.load(file)[name] for file in files]) for name in ("ids", "log_probs")}
    numbers = torch.tensor([18, 0, 7])
    found = LikeliestTokens(made, "train", numbers)
    for index, number in enumerate(numbers):
        assert all(torch.equal(tensor, whole[name][number]) for name, tensor in found[index].items())


def test_the_linear_schedule_falls_to_nothing(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    options = replace(QUICK, steps=4, schedule="linear", eval_steps=1)
    trained = lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    rates = [event["lr"] for event in trained.metrics() if event["event"] == "train"]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_the_curves_are_logged_as_they_come(pipeline: SimpleNamespace) -> None:
    """Every step of a short run, with the gradient's norm before clipping."""
    events = [event for event in Artifact.open(pipeline.lora).metrics() if event["event"] == "train"]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert all(event["grad_norm"] > 0 and event["loss"] > 0 for event in events)
    assert len({event["grad_norm"] for event in events}) == 6


def stopped(*_: object) -> None:
    raise Stopped("SIGTERM")


def test_stopped_and_run_again(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoraOptions(train_maps=False, steps=6, grad_accum=2, eval_steps=3, lr=1e-2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_save_adapter", stopped)
        with pytest.raises(Stopped):
            lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    assert not (tmp_path / "l" / "manifest.json").exists()
    again = lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    again.verify()
    assert again.id == Artifact.open(pipeline.lora).id


@pytest.mark.parametrize(
    ("every", "changes"),
    [
        (1, {}),
        (4, {"batch_size": 2}),
        (2, {"train_maps": True, "dropout": 0.2, "steps": None, "epochs": 1}),
        (2, {"train_maps": True, "match": "teacher", "schedule": "linear"}),
        (3, {"match": "teacher", "match_weight": 0.5, "batch_size": 2, "stored": 4}),
        (2, {"full_attention": True, "match": "teacher", "lr": 1e-3, "stored": 4}),
    ],
)
def test_resumed_at_every_step_is_the_same_to_the_byte(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, changes: dict
) -> None:
    stored = changes.pop("stored", None)
    data = None if stored is None else str(predicting(pipeline, tmp_path, stored))
    options = replace(LoraOptions(steps=7, grad_accum=2, eval_steps=3, lr=1e-2), **changes)
    whole = lora(pipeline.transfer, tmp_path / "whole", options=options, data=data, load=CPU)
    monkeypatch.setattr(checkpoints, "SECONDS", 0)
    monkeypatch.setattr(checkpoints, "COST", inf)
    record, saved = Checkpoints.record, []

    def die(self, folder: Path, since: float) -> None:
        record(self, folder, since)
        saved.append(folder.name)
        assert not list(folder.glob("*.bin"))
        if len(saved) % every == 0:
            raise Stopped("SIGKILL")

    monkeypatch.setattr(Checkpoints, "record", die)
    for _ in range(20):
        try:
            resumed = lora(pipeline.transfer, tmp_path / "l", options=options, data=data, load=CPU)
            break
        except Stopped:
            assert [folder.name for folder in (tmp_path / "l" / "scratch").iterdir()] == saved[-1:]
    assert saved == [f"checkpoint-{step}" for step in range(1, whole.summary["steps"])]
    assert resumed.metrics() == whole.metrics()
    assert resumed.id == whole.id
    assert {n: resumed.read(n) for n in resumed.files} == {n: whole.read(n) for n in whole.files}


FULL = LoraOptions(steps=4, grad_accum=2, eval_steps=2, lr=2e-3, full_attention=True)


def test_all_of_the_projections_are_trained(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """What PEFT loads, what eval loads, and what is merged are one student; and it is better than before."""
    made = lora(pipeline.transfer, tmp_path / "l", options=FULL, load=CPU)
    made.verify()
    assert made.summary["loss"] < made.summary["initial_loss"]
    assert made.config["full_attention"] is True
    assert not {"rank", "alpha", "dropout"} & made.config.keys()
    tensors = made.load("adapter/adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(64, 64), (32, 64)}
    assert len(tensors) == 2 * 4
    student = load_student(made, pipeline.teacher, CPU)
    bare = logits(student)
    adapted = logits(PeftModel.from_pretrained(student, made.path / "adapter"))
    found = logits(load_any(str(made.path), CPU).model)
    assert torch.equal(found, adapted)
    assert (adapted - bare).abs().max() > 0.1
    merged = merge(made.path, tmp_path / "student")
    assert merged.summary["folded"] == 8
    torch.testing.assert_close(logits(load_any(str(merged.path), CPU).model), found)


def test_steps_that_16_bits_do_not_resolve_add_up(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """Weights in bf16 are trained in fp32, and only some of them round to another number."""
    options = replace(FULL, lr=1e-4)
    load = replace(CPU, dtype="bfloat16")
    made = lora(pipeline.transfer, tmp_path / "l", options=options, load=load)
    teacher = load_file(pipeline.teacher / "model.safetensors")
    tensors = made.load("adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    moved = [
        (tensor != teacher[name.removeprefix("base_model.model.")].bfloat16()).float().mean()
        for name, tensor in tensors.items()
    ]
    assert 0.01 < min(moved) < max(moved) < 0.9


def test_what_all_of_the_projections_do_not_go_with(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--match teacher needs stored predictions"):
        lora(pipeline.transfer, tmp_path / "l", options=replace(FULL, match="teacher"), load=CPU)
    with pytest.raises(UsageError, match="cannot be combined with --shard"):
        lora(pipeline.transfer, tmp_path / "l", options=FULL, load=replace(CPU, shard=True))
    monkeypatch.setattr(module, "device_memory", lambda _: 100.0)
    with pytest.raises(NotEnoughSpace, match="needs 295 kB more of the device's memory"):
        lora(pipeline.transfer, tmp_path / "l", options=FULL, load=CPU)
    assert not (tmp_path / "l").exists()


def test_half_written_and_damaged_checkpoints_are_not_used(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 0)
    monkeypatch.setattr(checkpoints, "COST", inf)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "record", stopped)  # died with Trainer's folder complete but not recorded
        with pytest.raises(Stopped):
            lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU)
    assert (tmp_path / "l" / "scratch" / "checkpoint-1" / "optimizer.pt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_save_adapter", stopped)
        with pytest.raises(Stopped):
            lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU)
    optimizer = tmp_path / "l" / "scratch" / "checkpoint-1" / "optimizer.pt"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    with pytest.raises(Damaged, match="--force"):
        lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU)


def test_rank_alpha_and_targets(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    options = replace(QUICK, rank=3, alpha=7.0, targets=("q_proj", "o_proj"), dropout=0.1)
    artifact = lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
    config = artifact.read_json("adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7.0, 0.1)
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj"]
    tensors = artifact.load("adapter/adapter_model.safetensors")
    assert {tuple(t.shape) for name, t in tensors.items() if "lora_A" in name} == {(3, 64)}
    assert artifact.config["targets"] == ["q_proj", "o_proj"]


def test_unknown_targets(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    there = (
        "attentions are q_proj, k_proj, v_proj, o_proj. "
        "Its other linear layers are down_proj, gate_proj, lm_head, up_proj"
    )
    with pytest.raises(UsageError, match=f"has no modules named c_attn.*{there}"):
        lora(pipeline.transfer, tmp_path / "l", options=replace(QUICK, targets=("q_proj", "c_attn")), load=CPU)
    assert not (tmp_path / "l").exists()


def test_other_data(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"one ship and {i} men at sea"}) + "\n" for i in range(30)))
    options = DataOptions(seq_len=32, pack=False)
    artifact = lora(pipeline.transfer, tmp_path / "l", options=QUICK, data=str(data), data_options=options, load=CPU)
    assert artifact.data["path"] == str(data)
    assert artifact.data["rows"] == {"train": 28, "validation": 2}
    assert artifact.data["seq_len"] == 32
    from_capture = lora(pipeline.transfer, tmp_path / "c", options=QUICK, data=str(pipeline.capture), load=CPU)
    default = lora(pipeline.transfer, tmp_path / "d", options=QUICK, load=CPU)
    assert from_capture.id == default.id
    foreign = capture_of_other_tokenizer(pipeline, tmp_path)
    with pytest.raises(IdentityMismatch, match="tokens of a tokenizer that is not the teacher's"):
        lora(pipeline.transfer, tmp_path / "n", options=QUICK, data=str(foreign), load=CPU)
    with pytest.raises(BadInput, match="is not a file"):
        lora(pipeline.transfer, tmp_path / "n", options=QUICK, data=str(tmp_path / "missing.txt"), load=CPU)
    assert not (tmp_path / "n").exists()


def capture_of_other_tokenizer(pipeline: SimpleNamespace, root: Path) -> Path:
    other = Path(shutil.copytree(pipeline.teacher, root / "other"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    options = DataOptions(seq_len=64, samples=3)
    return capture(str(other), str(pipeline.text), root / "foreign", options=options, load=CPU).path


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DataOptions]:
    """Data whose rows have 6 to 44 tokens, and how it is read; 4 of 75 rows are for validation."""
    path = tmp_path_factory.mktemp("unequal") / "rows.jsonl"
    text = "two men saw a whale at home, then one white sail"
    path.write_text("".join(json.dumps({"text": text[i % 4 : i % 4 + 5 + 7 * i % 39]}) + "\n" for i in range(75)))
    return str(path), DataOptions(seq_len=48, pack=False)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_validation_is_the_mean_over_tokens(
    pipeline: SimpleNamespace, unequal: tuple[str, DataOptions], tmp_path: Path, batch_size: int
) -> None:
    data, form = unequal
    options = replace(QUICK, steps=1, lr=0.0, batch_size=batch_size)
    trained = lora(pipeline.transfer, tmp_path / "l", options=options, data=data, data_options=form, load=CPU)
    rows = split_rows(read_rows(data, load_tokenizer(pipeline.teacher), form), 0.05, options.seed)[1]
    assert rows.valid is not None and len(set(rows.valid.sum(1).tolist())) > 1
    student = load_student(Artifact.open(pipeline.transfer), pipeline.teacher, CPU).eval()
    losses = []
    for ids, valid in zip(rows.input_ids.long(), rows.valid, strict=True):
        with torch.no_grad():
            predictions = student(input_ids=ids[valid][None], use_cache=False).logits[0, :-1].log_softmax(-1)
        losses += (-predictions.gather(1, ids[valid][1:, None])).flatten().tolist()
    assert trained.summary["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_one_device_whatever_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would take all of them, for a batch of 8 times the rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert TrainingArguments(str(tmp_path)).train_batch_size == 8 * 8
    chosen = arguments(replace(QUICK, batch_size=3), torch.device("cuda", 1), str(tmp_path))
    assert (chosen.n_gpu, chosen.train_batch_size, chosen.eval_batch_size) == (1, 3, 3)
    assert chosen.device == torch.device("cuda", 1)
    assert chosen.parallel_mode == ParallelMode.NOT_PARALLEL
    first = arguments(QUICK, torch.device("cuda"), str(tmp_path))
    assert (first.n_gpu, first.device) == (1, torch.device("cuda", 0))


@pytest.mark.parametrize("changes", [{}, {"train_maps": True, "match": "teacher", "dropout": 0.2}])
def test_gradient_checkpointing_computes_twice_and_trains_the_same(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    options, calls, forward = replace(QUICK, **changes), [], HybridAttention.forward

    def counted(self, *args):
        calls.append(torch.is_grad_enabled() and self.training)
        return forward(self, *args)

    monkeypatch.setattr(HybridAttention, "forward", counted)
    kept = lora(pipeline.transfer, tmp_path / "kept", options=options, load=CPU)
    once = sum(calls)
    calls.clear()
    again = lora(pipeline.transfer, tmp_path / "again", options=options, load=CPU, gradient_checkpointing=True)
    assert (once, sum(calls)) == (2 * 2 * 2, 2 * 2 * 2 * 2)  # layers, passes, steps
    for name in kept.files:
        if name.endswith(".safetensors"):
            torch.testing.assert_close(again.load(name), kept.load(name), rtol=0, atol=1e-6)
    assert again.config == kept.config


@pytest.mark.parametrize("changes", [{}, {"train_maps": True, "match": "teacher"}])
def test_a_training_that_diverges_is_not_finished(pipeline: SimpleNamespace, tmp_path: Path, changes: dict) -> None:
    options = replace(QUICK, steps=4, grad_accum=1, lr=1e6, **changes)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"diverged: the \w+ loss is nan at step \d.*lower --lr \(it was 1e\+06\)"):
            lora(pipeline.transfer, tmp_path / "l", options=options, load=CPU)
        assert not (tmp_path / "l" / "manifest.json").exists()
        assert (tmp_path / "l" / "progress.json").exists()
    lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU, force=True).verify()


def test_weights_that_are_not_finite_are_not_finished(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step can break what every loss before it found in order."""
    monkeypatch.setattr(lora_training.Reporter, "check", lambda *_: None)
    with pytest.raises(BadInput, match=r"diverged: base_model.*lora_A.* holds NaN or infinity at step 4"):
        lora(pipeline.transfer, tmp_path / "l", options=replace(QUICK, steps=4, grad_accum=1, lr=1e6), load=CPU)
    assert not (tmp_path / "l" / "manifest.json").exists()


def test_longer_rows_than_the_model_takes(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--seq-len 129 is over the 128 tokens"):
        lora(
            pipeline.transfer,
            tmp_path / "l",
            options=QUICK,
            data=str(pipeline.text),
            data_options=DataOptions(seq_len=129),
            load=CPU,
        )
    assert not (tmp_path / "l").exists()


@pytest.fixture
def moved(pipeline: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """Copies of capture and transfer of a teacher that is elsewhere now (`teacher`)."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(pipeline.teacher, old)
    capture(str(old), str(pipeline.text), tmp_path / "capture", options=DataOptions(seq_len=64, samples=6), load=CPU)
    options = TransferOptions(steps=0)
    transfer(tmp_path / "capture", tmp_path / "transfer", options=options)
    old.rename(new)
    return SimpleNamespace(transfer=tmp_path / "transfer", teacher=new, old=old)


def test_a_moved_teacher_is_asked_for(moved: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"no longer at {moved.old}. Pass its folder with --teacher"):
        lora(moved.transfer, tmp_path / "l", options=QUICK, load=CPU)
    assert not (tmp_path / "l").exists()
    artifact = lora(moved.transfer, tmp_path / "l", options=QUICK, teacher=str(moved.teacher), load=CPU)
    assert str(moved.teacher).encode() not in b"".join(artifact.read(name) for name in artifact.files)
    with pytest.raises(BadInput, match="--teacher"):
        load_any(str(artifact.path), CPU)
    assert load_any(str(artifact.path), CPU, teacher=str(moved.teacher)).kind == "lora"


def test_another_teacher_is_refused(moved: SimpleNamespace, tmp_path: Path, new_teacher) -> None:
    other = new_teacher(tmp_path / "other", seed=1)
    with pytest.raises(IdentityMismatch, match="is not the teacher that was captured: It differs in its weights"):
        lora(moved.transfer, tmp_path / "l", options=QUICK, teacher=str(other), load=CPU)
    assert not (tmp_path / "l").exists()
    shutil.copytree(other, moved.old)  # also where the captured one was
    with pytest.raises(IdentityMismatch, match="differs in its weights"):
        lora(moved.transfer, tmp_path / "l", options=QUICK, load=CPU)
    with pytest.raises(IdentityMismatch, match="differs in its weights"):
        load_any(str(moved.transfer), CPU)


def test_a_part_of_the_layers_is_not_a_student(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    transfer(pipeline.capture, tmp_path / "part", options=TransferOptions(steps=0), layers=[1])
    with pytest.raises(IdentityMismatch, match="none for layers 0"):
        lora(tmp_path / "part", tmp_path / "l", options=QUICK, load=CPU)
    assert not (tmp_path / "l").exists()


def test_wrong_kind_and_other_settings(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lolcats_cli.stages.lora.load_student", lambda *_: pytest.fail("loaded the student"))
    with pytest.raises(WrongKind, match="is a capture artifact, but a transfer artifact"):
        lora(pipeline.capture, tmp_path / "l", options=QUICK, load=CPU)
    with pytest.raises(ConfigMismatch) as caught:
        lora(pipeline.transfer, pipeline.lora, options=replace(QUICK, steps=6, eval_steps=3, rank=4), load=CPU)
    assert caught.value.fields == ["config.rank"]


def test_finished_is_returned_without_loading_the_teacher(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU)
    half = lora(pipeline.transfer, tmp_path / "half", options=QUICK, load=replace(CPU, dtype="bfloat16"))
    monkeypatch.setattr("lolcats_cli.stages.lora.load_student", lambda *_: pytest.fail("loaded the student"))
    assert lora(pipeline.transfer, made.path, options=QUICK, load=CPU).id == made.id
    assert lora(pipeline.transfer, half.path, options=QUICK, load=replace(CPU, dtype="bfloat16")).id == half.id
    short = {"data": str(pipeline.text), "data_options": DataOptions(seq_len=32)}
    for place, asked, field in (
        (half.path, {}, "config.dtype"),
        (made.path, {"options": replace(QUICK, targets=("q_proj",))}, "config.targets"),
        (made.path, short, "data.seq_len"),
    ):
        with pytest.raises(ConfigMismatch) as caught:
            lora(pipeline.transfer, place, **{"options": QUICK, "load": CPU, **asked})
        assert field in caught.value.fields


def test_a_damaged_adapter_is_not_loaded(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    from lolcats_formats import Damaged

    copy = Path(shutil.copytree(pipeline.lora, tmp_path / "l"))
    weights = copy / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors is damaged"):
        load_any(str(copy), CPU)
