"""What a capture stores makes no difference to the maps; every store is resumed, joined and read with care."""

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
from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig

from lolcats_cli import stopping
from lolcats_cli.artifacts import layout, stores
from lolcats_cli.artifacts.layout import Layout
from lolcats_cli.artifacts.logits import likeliest
from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import BadInput, IdentityMismatch, Stopped, UsageError
from lolcats_cli.stages import checkpoints
from lolcats_cli.stages.activations import StoredActivations
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.stages.join import join
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.stages.units import UnitRecord
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

LAYERS = 5
DATA = DataOptions(seq_len=32, samples=22)
OPTIONS = TransferOptions(
    HybridConfig(window=8, feature_dim=16, linear_factor="exp"), steps=6, grad_accum=2, eval_steps=3
)
STORES: dict[str, dict] = {
    "attention": {},
    "block": {"store": "block", "block_size": 2},
    "tokens": {"store": "tokens"},
}
ROW_BYTES = 32 * (4 + 2 * 2) * 16 * 4  # of one layer: T · (H + 2K) · D · fp32


@pytest.fixture(scope="module")
def deep(
    tiny_text: Path, new_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A teacher of five layers, and padded data for it."""
    root = tmp_path_factory.mktemp("deep")
    words = tiny_text.read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 2 + i % 6])}) for i in range(22)]
    (root / "padded.jsonl").write_text("\n".join(lines))
    teacher = new_teacher(root / "teacher", num_hidden_layers=LAYERS)
    return SimpleNamespace(root=root, teacher=teacher, text=tiny_text, padded=root / "padded.jsonl")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of three rows, and two of them in a file of hidden states."""
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * ROW_BYTES + 1)


def run(deep: SimpleNamespace, folder: Path, options: DataOptions = DATA, **store: object) -> Artifact:
    data = deep.text if options.pack else deep.padded
    return capture(str(deep.teacher), str(data), folder, options=options, batch_size=2, **store)  # type: ignore[arg-type]


def hashes(artifact: Artifact) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in artifact.files.items()}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("training", [{}, {"batch_size": 2, "grad_accum": 1}, {"patience": 0, "eval_steps": 1}])
def test_three_stores_give_the_same_maps(deep: SimpleNamespace, tmp_path: Path, pack: bool, training: dict) -> None:
    """To the bit, with batches over the ends of groups, and where layers stop early."""
    made = {}
    for name, store in STORES.items():
        run(deep, tmp_path / name, replace(DATA, pack=pack), **store)
        made[name] = transfer(tmp_path / name, tmp_path / f"maps-{name}", options=replace(OPTIONS, **training))
    assert len([name for name in made["tokens"].files if name.startswith("maps/")]) == LAYERS
    assert hashes(made["block"]) == hashes(made["attention"])
    assert hashes(made["tokens"]) == hashes(made["attention"])
    assert made["tokens"].summary == made["attention"].summary
    if training.get("patience") == 0:
        steps = {figures["steps"] for figures in made["tokens"].summary["layers"].values()}
        assert len(steps) > 1, "no layer stopped earlier than another, which is what this case is for"


def test_what_is_stored(deep: SimpleNamespace, tmp_path: Path) -> None:
    block = run(deep, tmp_path / "block", **STORES["block"])
    layout_ = Layout.of(block.manifest)
    assert [list(chosen) for chosen in layout_.blocks] == [[0, 1], [2, 3], [4]]
    folders = {name.rsplit("/", 1)[0] for name in block.files if name.startswith("hidden/")}
    assert folders == {"hidden/001", "hidden/002"}
    stored = sum(i.nbytes for n in block.files if n.startswith("hidden/") for i in block.header(n).values())
    assert stored == block.summary["bytes"] == 22 * layout_.row_bytes == 22 * 2 * 32 * 64 * 4
    tokens = run(deep, tmp_path / "tokens", **STORES["tokens"])
    assert tokens.summary["bytes"] == 0
    assert {name.split("/")[0] for name in tokens.files} == {"tokens", "statistics"}
    assert tokens.config["store"] == "tokens"
    assert "block_size" not in tokens.config


def test_hidden_states_are_the_models_own(deep: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    block = run(deep, tmp_path / "c", **STORES["block"])
    model = AutoModelForCausalLM.from_pretrained(deep.teacher).eval()
    for split in layout.SPLITS:
        ids = block.load(f"tokens/{split}.safetensors")["input_ids"].long()
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        for number, layer in ((1, 2), (2, 4)):
            names = sorted(name for name in block.files if name.startswith(f"hidden/{number:03d}/{split}-"))
            found = torch.cat([block.load(name)["hidden"] for name in names])
            torch.testing.assert_close(found, expected[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pack", [True, False])
def test_the_likeliest_next_tokens_are_the_teachers(deep: SimpleNamespace, tmp_path: Path, pack: bool) -> None:
    """With every store, for every row; to their rounding."""
    from transformers import AutoModelForCausalLM

    captures = [
        run(deep, tmp_path / name, replace(DATA, pack=pack), store_logits=5, **store) for name, store in STORES.items()
    ]
    model = AutoModelForCausalLM.from_pretrained(deep.teacher).eval()
    for split in layout.SPLITS:
        tokens = captures[0].load(f"tokens/{split}.safetensors")
        valid = tokens.get("valid", torch.ones_like(tokens["input_ids"], dtype=torch.bool))
        with torch.no_grad():
            logits = model(input_ids=tokens["input_ids"].long(), attention_mask=valid.long()).logits
        log_probs, ids = logits.log_softmax(-1).topk(5)
        for made in captures:
            files = sorted(name for name in made.files if name.startswith(f"logits/{split}-"))
            stored = [made.load(name) for name in files]
            found = {name: torch.cat([part[name] for part in stored]) for name in ("ids", "log_probs")}
            assert (found["ids"].dtype, found["log_probs"].dtype) == (torch.int32, torch.float16)
            assert (found["ids"][valid] == ids[valid]).float().mean() > 0.99  # others may be as likely
            torch.testing.assert_close(found["log_probs"][valid].float(), log_probs[valid], rtol=1e-3, atol=1e-4)
            assert not found["ids"][~valid].any()
            assert not found["log_probs"][~valid].any()
    for made in captures:
        layout_ = Layout.of(made.manifest)
        stored = [name for name in made.files if name.startswith(("layers/", "hidden/", "logits/"))]
        payload = sum(info.nbytes for name in stored for info in made.header(name).values())
        assert made.summary["bytes"] == payload == 22 * layout_.row_bytes
        assert layout_.row_file_bytes(layout.LOGITS) == 32 * 5 * stores.LOGIT_BYTES


def test_likeliest_next_tokens_change_nothing_else(deep: SimpleNamespace, tmp_path: Path) -> None:
    for name, store in STORES.items():
        without = run(deep, tmp_path / name, **store)
        made = run(deep, tmp_path / f"{name}-logits", store_logits=5, **store)
        assert "logits" not in without.config
        assert {n: h for n, h in hashes(made).items() if not n.startswith("logits/")} == hashes(without)
        assert hashes(transfer(made.path, tmp_path / f"a-{name}", options=OPTIONS)) == hashes(
            transfer(without.path, tmp_path / f"b-{name}", options=OPTIONS)
        )


def test_more_next_tokens_than_the_vocabulary_has(deep: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--store-logits 261 is more than the 260 tokens"):
        run(deep, tmp_path / "c", store_logits=261)
    assert not (tmp_path / "c").exists()


def test_what_is_not_a_number_is_not_stored() -> None:
    logits = torch.zeros(3, 7)
    logits[1, 2] = float("nan")
    with pytest.raises(BadInput, match="predicts NaN"):
        likeliest(logits, 2, None)
    assert not likeliest(logits, 2, torch.tensor([True, False, True]))["ids"][1].any()
    logits[1] = float("-inf")
    logits[1, 4] = 3.0
    found = likeliest(logits, 2, None)  # impossible tokens have the probability 0
    assert found["ids"][1, 0] == 4
    assert found["log_probs"][1].float().exp().tolist() == [1, 0]


def test_some_layers_alone(deep: SimpleNamespace, tmp_path: Path) -> None:
    """Neither the others nor the block around them make a difference; parts are joined to the whole."""
    whole = {}
    for name, store in STORES.items():
        run(deep, tmp_path / name, **store)
        whole[name] = transfer(tmp_path / name, tmp_path / f"maps-{name}", options=OPTIONS)
        parts = []
        for layers in ([0, 2], [1], [3, 4]):
            part = transfer(tmp_path / name, tmp_path / f"{name}{layers}", options=OPTIONS, layers=layers)
            for layer in layers:
                assert hashes(part)[maps_file(layer)] == hashes(whole[name])[maps_file(layer)]
            parts.append(part.path)
        assert join(parts, tmp_path / f"joined-{name}").id == whole[name].id


def test_the_layers_to_keep_are_the_same(deep: SimpleNamespace, tmp_path: Path) -> None:
    kept = []
    for name, store in STORES.items():
        run(deep, tmp_path / name, **store)
        made = transfer(tmp_path / name, tmp_path / f"m-{name}", options=replace(OPTIONS, steps=1), keep_auto=2)
        kept.append((made.config["keep_softmax"], hashes(made)))
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("store", ["block", "tokens"])
@pytest.mark.parametrize("pack", [True, False])
def test_rows_captured_apart_are_the_capture_of_one_machine(
    deep: SimpleNamespace, tmp_path: Path, store: str, pack: bool
) -> None:
    options = replace(DATA, pack=pack)
    kept = STORES[store] | {"store_logits": 3}
    whole = run(deep, tmp_path / "whole", options, **kept)
    parts = [
        run(deep, tmp_path / str(first), replace(options, first=first, samples=samples), **kept).path
        for first, samples in ((0, 7), (7, 2), (9, 13))
    ]
    joined = join(parts, tmp_path / "joined")
    assert hashes(joined) == hashes(whole)
    assert joined.id == whole.id


@pytest.mark.parametrize("store", STORES)
def test_a_capture_stopped_after_every_batch_is_the_same_to_the_byte(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """A signal waits for the batch that is computed, and nothing that was computed is computed again."""
    kept = STORES[store] | {"store_logits": 3}
    whole = run(deep, tmp_path / "whole", **kept)
    add, computed = UnitRecord.add, []

    def once(record: UnitRecord, model: object, block: object, batch: list[int], *rest: object) -> None:
        computed.append((record.unit.block, record.unit.split, tuple(batch)))
        add(record, model, block, batch, *rest)  # type: ignore[arg-type]
        stopping._requested = "SIGTERM"

    monkeypatch.setattr(UnitRecord, "add", once)
    stops = 0
    for _ in range(200):
        try:
            parts = run(deep, tmp_path / "parts", **kept)
            break
        except Stopped:
            stops += 1
        finally:
            stopping._requested = None
    assert hashes(parts) == hashes(whole)
    assert parts.id == whole.id
    assert len(computed) == len(set(computed))
    assert stops >= len(computed) - 1


@pytest.mark.parametrize(("store", "steps"), [("block", 6), ("tokens", 6), ("tokens", (2, 6, 0, 5, 3))])
def test_a_transfer_stopped_at_every_step_is_the_same_to_the_byte(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, steps: int | tuple[int, ...]
) -> None:
    run(deep, tmp_path / "c", **STORES[store])
    options = replace(OPTIONS, eval_steps=2, patience=0, steps=steps)
    whole = transfer(tmp_path / "c", tmp_path / "whole", options=options)
    monkeypatch.setattr(checkpoints, "SECONDS", 0)
    monkeypatch.setattr(checkpoints, "COST", inf)
    record = Checkpoints.record

    def die(self: Checkpoints, folder: Path, since: float) -> None:
        record(self, folder, since)
        raise Stopped("SIGKILL")

    monkeypatch.setattr(Checkpoints, "record", die)
    for _ in range(100):
        try:
            resumed = transfer(tmp_path / "c", tmp_path / "parts", options=options)
            break
        except Stopped:
            continue
    assert hashes(resumed) == hashes(whole)
    assert resumed.id == whole.id


def test_the_teacher_is_needed_and_must_be_the_same(deep: SimpleNamespace, tmp_path: Path, new_teacher) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(deep.teacher, moved)
    capture(str(moved), str(deep.text), tmp_path / "c", options=DATA, store="tokens")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"is no longer at .*Pass its folder with --teacher"):
        transfer(tmp_path / "c", tmp_path / "t", options=OPTIONS)
    other = new_teacher(tmp_path / "other", num_hidden_layers=LAYERS, seed=3)
    with pytest.raises(IdentityMismatch, match="differs in its weights"):
        transfer(tmp_path / "c", tmp_path / "t", options=OPTIONS, teacher=str(other))
    assert not (tmp_path / "t").exists()
    made = transfer(tmp_path / "c", tmp_path / "t", options=OPTIONS, teacher=str(tmp_path / "elsewhere"))
    assert len(made.summary["layers"]) == LAYERS


def test_the_dtype_is_that_of_the_capture(deep: SimpleNamespace, tmp_path: Path) -> None:
    found = {}
    for name, store in STORES.items():
        run(deep, tmp_path / name, load=LoadOptions(dtype="bfloat16"), **store)
        found[name] = hashes(transfer(tmp_path / name, tmp_path / f"maps-{name}", options=OPTIONS))
    assert found["block"] == found["attention"] == found["tokens"]


@pytest.mark.parametrize("options", [{}, {"layers": [1, 3, 4]}, {"keep_softmax": [0, 1]}, {"keep_auto": 2}])
def test_block_by_block_from_tokens_makes_no_difference(deep: SimpleNamespace, tmp_path: Path, options: dict) -> None:
    run(deep, tmp_path / "c", **STORES["tokens"])
    whole = transfer(tmp_path / "c", tmp_path / "whole", options=replace(OPTIONS, steps=2), **options)
    for size in (1, 2):
        made = transfer(
            tmp_path / "c", tmp_path / f"{size}", options=replace(OPTIONS, steps=2), block_size=size, **options
        )
        assert hashes(made) == hashes(whole)
        assert made.id == whole.id
        assert not list(made.path.glob(".*"))


def test_block_by_block_one_blocks_hidden_states_are_on_disk(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stop anywhere continues from there, to the same bytes."""
    run(deep, tmp_path / "c", **STORES["tokens"])
    whole = transfer(tmp_path / "c", tmp_path / "whole", options=replace(OPTIONS, steps=2))
    add, computed = UnitRecord.add, []

    def once(record: UnitRecord, model: object, block: object, batch: list[int], *rest: object) -> None:
        computed.append((record.unit.block, record.unit.split, tuple(batch)))
        add(record, model, block, batch, *rest)  # type: ignore[arg-type]
        there = sorted(int(path.name) for path in (tmp_path / "parts" / ".hidden-0").iterdir())
        assert there in ([record.unit.block + 1], [record.unit.block, record.unit.block + 1])
        stopping._requested = "SIGTERM"

    monkeypatch.setattr(UnitRecord, "add", once)
    for _ in range(200):
        try:
            made = transfer(tmp_path / "c", tmp_path / "parts", options=replace(OPTIONS, steps=2), block_size=2)
            break
        except Stopped:
            continue
        finally:
            stopping._requested = None
    assert made.id == whole.id
    assert len(computed) == len(set(computed)) == 2 * len({batch[1:] for batch in computed})  # two blocks, once each


def test_block_by_block_is_for_tokens(deep: SimpleNamespace, tmp_path: Path) -> None:
    run(deep, tmp_path / "c", **STORES["block"])
    with pytest.raises(UsageError, match=r"--block-size is for captures made with --store tokens"):
        transfer(tmp_path / "c", tmp_path / "t", options=OPTIONS, block_size=2)


def test_eight_bits_are_a_rounding_of_the_rest(deep: SimpleNamespace, tmp_path: Path) -> None:
    whole, small = run(deep, tmp_path / "whole"), run(deep, tmp_path / "small", store_dtype="float8_e4m3")
    scales = 22 * LAYERS * (4 + 2 + 2) * 4  # rows, layers, heads of q, k and v, bytes
    assert small.summary["bytes"] == whole.summary["bytes"] // 4 + scales
    exact, rounded = StoredActivations(whole), StoredActivations(small)
    for layer in range(LAYERS):
        for one, other in zip(exact.batches([layer], "train", 4), rounded.batches([layer], "train", 4), strict=True):
            for name in "qkv":
                a, b = getattr(one[layer], name), getattr(other[layer], name)
                assert b.dtype == a.dtype
                largest = a.abs().amax((2, 3), keepdim=True)
                # Four bits of mantissa, and 2^-10 of a unit near zero, where the unit is the largest value over 448.
                assert ((a - b).abs() <= (a.abs() / 16).maximum(largest / 448 / 1024) * 1.001).all()
    parts = [
        run(deep, tmp_path / str(first), replace(DATA, first=first, samples=samples), store_dtype="float8_e4m3").path
        for first, samples in ((0, 9), (9, 13))
    ]
    assert join(parts, tmp_path / "joined").id == small.id
    found = [transfer(made.path, tmp_path / f"maps-{made.path.name}", options=OPTIONS) for made in (small, whole)]
    for layer, figures in found[1].summary["layers"].items():
        assert found[0].summary["layers"][layer]["relative_mse"] == pytest.approx(figures["relative_mse"], rel=0.1)


def test_layers_without_attention_are_passed_through(tiny_teacher: Path, tiny_text: Path, tmp_path: Path) -> None:
    """A hybrid's convolutions: in every block and unit, and in joined captures."""
    from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = Lfm2Config(**sizes, **heads, layer_types=kinds, pad_token_id=2, max_position_embeddings=128)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "teacher")
    case = SimpleNamespace(teacher=tmp_path / "teacher", text=tiny_text)
    made = {}
    for name, store in (*STORES.items(), ("a layer a block", {"store": "block", "block_size": 1})):
        whole = run(case, tmp_path / name, **store)
        made[name] = hashes(transfer(whole.path, tmp_path / f"maps-{name}", options=replace(OPTIONS, steps=2)))
        parts = [run(case, tmp_path / f"{name}{n}", replace(DATA, first=n, samples=11), **store).path for n in (0, 11)]
        assert join(parts, tmp_path / f"joined-{name}").id == whole.id
    assert len([name for name in made["tokens"] if name.startswith("maps/")]) == 2
    assert all(found == made["attention"] for found in made.values())
