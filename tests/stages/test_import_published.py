"""import: files in the shape that the LoLCATs authors' code saves become artifacts of ours, or are refused."""

from __future__ import annotations

import contextlib
import pickle
import random
import resource
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, ConfigMismatch
from lolcats_kernels import HybridConfig, HybridMaps
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lolcats_cli.errors import BadInput, IdentityMismatch
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.stages.import_published import holds_adapter, import_adapter, import_maps
from lolcats_cli.stages.merge import merge
from lolcats_cli.student.build import linearize
from lolcats_cli.teacher.load import LoadOptions

HYBRID = HybridConfig(window=8, layout="terraced")
IDS = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(0))


def published_maps(layers: tuple[int, ...] = (0, 1), prefix: str = "model.", bias: bool = False) -> dict[str, Tensor]:
    """What attention transfer saves: 4 heads of 16, features of 6 (T2R: 16)."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in layers:
        name = f"{prefix}layers.{layer}.self_attn"
        for side in "qk":
            columns = 16 if bias else 6
            weights[f"{name}.feature_map_{side}.mlp.layer"] = torch.randn(4, 16, columns, generator=generator)
            if bias:
                weights[f"{name}.feature_map_{side}.mlp.bias"] = torch.randn(1, 4, 1, 1, generator=generator)
        weights[f"{name}.window_factors"] = torch.randn(1, 4, 1, 1, generator=generator)
    return weights


def save(path: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"model_state_dict": weights, "step": 100, "eval/loss": 0.25}, path)
    return path


def student(teacher: Path, weights: dict[str, Tensor], hybrid: HybridConfig) -> torch.nn.Module:
    """The student that such a file means, put together by hand."""
    maps = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn"
        maps[layer] = {
            "q_weight": weights[f"{name}.feature_map_q.mlp.layer"],
            "k_weight": weights[f"{name}.feature_map_k.mlp.layer"],
            "window_logit": weights[f"{name}.window_factors"].flatten(),
        }
    return linearize(AutoModelForCausalLM.from_pretrained(teacher).eval(), hybrid, maps)


@pytest.fixture(scope="module")
def made(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Both checkpoints, and what was made from them."""
    root = tmp_path_factory.mktemp("published")
    made = SimpleNamespace(teacher=pipeline.teacher, weights=published_maps())
    made.maps_file = save(root / "distill_best.pt", made.weights)
    hybrid = HybridConfig(feature_dim=6, window=8, layout="terraced")
    made.expected = get_peft_model(
        student(made.teacher, made.weights, hybrid),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ).eval()
    generator = torch.Generator().manual_seed(2)
    lora = {}
    for name, parameter in made.expected.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            lora[name] = parameter.data
    assert any(name.endswith("self_attn.q_proj.lora_A.default.weight") for name in lora)
    made.lora_file = save(root / "finetune_best.pt", lora)
    made.maps = import_maps(made.maps_file, root / "maps", str(made.teacher), hybrid=HYBRID).path
    made.lora = import_adapter(made.lora_file, root / "lora", made.maps).path
    return made


def test_what_is_imported_computes_what_the_checkpoints_mean(made: SimpleNamespace, tmp_path: Path) -> None:
    maps = Artifact.open(made.maps, "transfer")
    maps.verify()
    assert maps.config["hybrid"] == HybridConfig(feature_dim=6, window=8, layout="terraced").to_dict()
    Artifact.open(made.lora, "lora").verify()
    with torch.no_grad():
        expected = made.expected(IDS).logits
        assert torch.allclose(load_any(str(made.lora), LoadOptions()).model(IDS).logits, expected, atol=1e-4)
        assert isinstance(made.expected, PeftModel)
        with made.expected.disable_adapter():
            assert torch.allclose(load_any(str(made.maps), LoadOptions()).model(IDS).logits, made.expected(IDS).logits)
        merged = merge(made.lora, tmp_path / "student").path
        assert torch.allclose(load_any(str(merged), LoadOptions()).model(IDS).logits, expected, atol=1e-4)


def test_finished_is_returned_without_loading_the_teacher(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_teacher
) -> None:
    other = new_teacher(tmp_path / "other", seed=1)
    monkeypatch.setattr("lolcats_cli.stages.import_published.load_model", lambda *_: pytest.fail("loaded the teacher"))
    assert import_maps(made.maps_file, made.maps, str(made.teacher), hybrid=HYBRID).path == made.maps
    for teacher, hybrid, field in (
        (made.teacher, replace(HYBRID, window=16), "config.hybrid.window"),
        (other, HYBRID, "teacher.weights_sha256"),
    ):
        with pytest.raises(ConfigMismatch) as caught:
            import_maps(made.maps_file, made.maps, str(teacher), hybrid=hybrid)
        assert caught.value.fields == [field]


def test_which_of_the_two_a_file_is(made: SimpleNamespace) -> None:
    assert not holds_adapter(made.maps_file)
    assert holds_adapter(made.lora_file)


def test_layers_without_maps_stay_softmax(made: SimpleNamespace, tmp_path: Path) -> None:
    file = save(tmp_path / "one.pt", published_maps(layers=(1,), prefix="base_model.model.model."))
    found = import_maps(file, tmp_path / "t", str(made.teacher), hybrid=HYBRID)
    assert (found.config["layers"], found.config["keep_softmax"]) == ([1], [0])
    assert load_any(str(found.path), LoadOptions()).model(IDS).logits.isfinite().all()


def test_t2r_with_its_bias(made: SimpleNamespace, tmp_path: Path) -> None:
    weights = published_maps(bias=True)
    file = save(tmp_path / "t2r.pt", {name: w for name, w in weights.items() if "window" not in name})
    found = import_maps(file, tmp_path / "t", str(made.teacher), hybrid=HybridConfig("t2r", window=0))
    state = found.load("maps/layer-001.safetensors")
    bias = weights["model.layers.1.self_attn.feature_map_k.mlp.bias"].flatten()
    assert torch.equal(state["k_bias"], bias[:, None].expand(4, 16))
    assert state.keys() == HybridMaps(HybridConfig("t2r", window=0), 4, 16).state_dict().keys()


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(made: SimpleNamespace, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"model_state_dict": Trap()}))
    torch.save({"model_state_dict": Trap()}, tmp_path / "trap2.pt")
    for name in ("trap.pt", "trap2.pt"):
        with pytest.raises(BadInput, match="not a checkpoint of tensors alone"):
            import_maps(tmp_path / name, tmp_path / "t", str(made.teacher), hybrid=HYBRID)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "t").exists()


def without(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, BadInput, "holds no model_state_dict"),
        ({"model.layers.0.mlp.weight": torch.ones(2)}, BadInput, "neither a feature map nor a window factor"),
        (published_maps(layers=(0, 5)), IdentityMismatch, "has maps for layer 5, and .* has 2 layers"),
        (without(published_maps(), "0.self_attn.window"), IdentityMismatch, "maps of layer 0 .* Check --feature-map"),
        (without(published_maps(), "map_k"), IdentityMismatch, "maps of layer 0"),
        (
            {n: w[:, :3] if "layer" in n else w for n, w in published_maps().items()},
            IdentityMismatch,
            "maps of layer 0",
        ),
        ({n: w * torch.nan for n, w in published_maps().items()}, BadInput, "NaN"),
    ],
)
def test_maps_that_do_not_fit(made: SimpleNamespace, tmp_path: Path, weights: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        import_maps(save(tmp_path / "x.pt", weights), tmp_path / "t", str(made.teacher), hybrid=HYBRID)
    assert not (tmp_path / "t").exists()


def test_adapters_that_do_not_fit(made: SimpleNamespace, tmp_path: Path) -> None:
    lora = torch.load(made.lora_file, weights_only=True)["model_state_dict"]
    first = next(iter(lora))
    for weights, error, message in (
        ({**lora, "lm_head.weight": torch.ones(2)}, BadInput, "not a weight of a LoRA adapter"),
        (without(lora, "0.self_attn.q_proj.lora_B"), BadInput, "A and B for every module, with the same rank"),
        ({name.replace("q_proj", "c_attn"): w for name, w in lora.items()}, IdentityMismatch, "c_attn"),
        ({**lora, first: lora[first][:, :5]}, IdentityMismatch, "q_proj"),
    ):
        with pytest.raises(error, match=message):
            import_adapter(save(tmp_path / "x.pt", weights), tmp_path / "l", made.maps)
        assert not (tmp_path / "l").exists()
    with pytest.raises(BadInput, match="neither a feature map"):
        import_maps(made.lora_file, tmp_path / "l", str(made.teacher), hybrid=HYBRID)


NAME = "model.layers.0.self_attn.feature_map_q.mlp.layer"
STRANGE = {
    "int key": lambda: {0: torch.ones(2)},
    "bytes key": lambda: {b"x": torch.ones(2)},
    "complex": lambda: {NAME: torch.ones(4, 16, 6, dtype=torch.complex64)},
    "bool": lambda: {NAME: torch.ones(4, 16, 6, dtype=torch.bool)},
    "int": lambda: {NAME: torch.ones(4, 16, 6, dtype=torch.int64)},
    "overflow": lambda: {NAME: torch.full((4, 16, 6), 1e300, dtype=torch.float64)},
    "meta": lambda: {NAME: torch.ones(4, 16, 6, device="meta")},
    "sparse": lambda: {NAME: torch.ones(4, 16, 6).to_sparse()},
    "quantised": lambda: {NAME: torch.quantize_per_tensor(torch.ones(4, 16, 6), 0.1, 0, torch.qint8)},
    "0-dim": lambda: {NAME: torch.ones(())},
    "repeated": lambda: {NAME: torch.ones(1).expand(2**20, 2**20, 6)},
    "long number": lambda: {NAME.replace(".0.", f".{'9' * 5000}."): torch.ones(4, 16, 6)},
    "nested": lambda: {NAME: {"x": torch.ones(2)}},
    "a list": lambda: [torch.ones(2)],
    "a tensor": lambda: torch.ones(2),
    "lora 0-dim": lambda: {"q_proj.lora_A.weight": torch.ones(()), "q_proj.lora_B.weight": torch.ones(2, 1)},
    "lora 1-dim": lambda: {"q_proj.lora_A.weight": torch.ones(4), "q_proj.lora_B.weight": torch.ones(4)},
    "lora rank 0": lambda: {"q_proj.lora_A.weight": torch.ones(0, 64), "q_proj.lora_B.weight": torch.ones(64, 0)},
}


@pytest.mark.parametrize("weights", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_sorts(made: SimpleNamespace, tmp_path: Path, weights, legacy: bool) -> None:
    torch.save(weights(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    for use in (
        lambda: import_maps(tmp_path / "x.pt", tmp_path / "t", str(made.teacher), hybrid=HYBRID),
        lambda: import_adapter(tmp_path / "x.pt", tmp_path / "t", made.maps),
    ):
        with pytest.raises((BadInput, IdentityMismatch)) as caught:
            use()
        assert len(str(caught.value)) < 500
    assert not (tmp_path / "t").exists()


def test_float64_is_taken_as_float32(made: SimpleNamespace, tmp_path: Path) -> None:
    file = save(tmp_path / "x.pt", {name: w.double() for name, w in made.weights.items()})
    assert import_maps(file, tmp_path / "t", str(made.teacher), hybrid=HYBRID).files == Artifact.open(made.maps).files


def test_a_file_that_grows_when_it_is_read_is_refused_at_once(made: SimpleNamespace, tmp_path: Path) -> None:
    """A zip whose records are deflated: 1 GB from 1 MB."""
    with (
        zipfile.ZipFile(made.maps_file) as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.infolist():
            with bomb.open(record.filename, "w") as file:
                file.write(plain.read(record.filename))
                if record.filename.endswith("data/0"):
                    for _ in range(1000):
                        file.write(bytes(10**6))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput, match="its records are compressed"):
        import_maps(tmp_path / "x.pt", tmp_path / "t", str(made.teacher), hybrid=HYBRID)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("content", [b"", b"hello\n" * 100, b'{"a": 1}', b"PK\3\4" + bytes(100), b"\x80\x02."])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.pt is not a checkpoint of tensors alone"):
        holds_adapter(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints(made: SimpleNamespace, tmp_path: Path, legacy: bool) -> None:
    """Bytes changed at random: read, or refused, and nothing else."""
    torch.save({"model_state_dict": made.weights}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    whole, draw = (tmp_path / "x.pt").read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(600)] = draw.randrange(256)
        (tmp_path / "x.pt").write_bytes(data)
        with contextlib.suppress(BadInput):
            holds_adapter(tmp_path / "x.pt")
