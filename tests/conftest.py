"""A tiny GQA Llama with random weights and a byte-level tokenizer, made from a seed."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What the tests marked `gpu` run on: nothing, and they are skipped; cuda (`make test-gpu`); or cpu, under Triton's
# interpreter. All other tests see no GPU.
TEST_DEVICE = os.environ.get("LOLCATS_TEST_DEVICE", "")
if TEST_DEVICE != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported
# Libraries' caches go to a temporary folder; they look there once, when they are imported.
CACHES = tempfile.mkdtemp(prefix="lolcats-tests-")
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
os.environ |= {name: f"{CACHES}/{name.lower()}" for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE")}

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

WORDS = "the whale and a ship at sea saw one white sail then two men sang of home".split()  # noqa: SIM905


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_teacher(folder: Path, *, seed: int = 0, **overrides: object) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**(config | overrides))).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """What a test marked `gpu` runs on; skips it where there is nothing."""
    if not TEST_DEVICE:
        pytest.skip("needs a GPU: make test-gpu")
    if TEST_DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("There is no GPU here that torch can use.")
    return torch.device(TEST_DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where GPUs are seen, tests that are not for them are skipped: they would use them."""
    if TEST_DEVICE == "cuda":
        for item in items:
            if not item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="sees no GPU: run it without LOLCATS_TEST_DEVICE"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: 2 layers, 4 query and 2 key heads of 16, context 128, fp32."""
    return make_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3,000 tokens of text for the tiny teacher."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (750,), generator=generator)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in picks))
    return path


@pytest.fixture(scope="session")
def new_teacher() -> Callable[..., Path]:
    """`make_teacher`, as test modules cannot import a conftest."""
    return make_teacher


@pytest.fixture(scope="session")
def pipeline(tiny_teacher: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The four stages run once, small: paths `teacher`, `text`, `capture`, `transfer`, `lora`, `student`. Read only."""
    from lolcats_kernels import HybridConfig

    from lolcats_cli.stages.capture import capture
    from lolcats_cli.stages.lora import lora
    from lolcats_cli.stages.lora_options import LoraOptions
    from lolcats_cli.stages.merge import merge
    from lolcats_cli.stages.transfer import transfer
    from lolcats_cli.stages.transfer_options import TransferOptions
    from lolcats_cli.teacher.records import DataOptions

    root = tmp_path_factory.mktemp("pipeline")
    made = SimpleNamespace(teacher=tiny_teacher, text=tiny_text)
    for name in ("capture", "transfer", "lora", "student"):
        setattr(made, name, root / name)
    capture(str(tiny_teacher), str(tiny_text), made.capture, options=DataOptions(seq_len=64, samples=20))
    hybrid = HybridConfig(window=8, feature_dim=16, linear_factor="exp")
    options = TransferOptions(hybrid, steps=6, grad_accum=4, lr=2e-2, eval_steps=3)
    transfer(made.capture, made.transfer, options=options)
    lora(made.transfer, made.lora, options=LoraOptions(train_maps=False, steps=6, grad_accum=2, eval_steps=3, lr=1e-2))
    merge(made.lora, made.student)
    return made
