"""Students of the embedded teacher, merged into folders, and what transformers answers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lolcats_kernels import HybridConfig

import lolcats_cli

ASSETS = Path(lolcats_cli.__file__).parent / "assets"
TEACHER = ASSETS / "teacher"


class Students:
    """Makes students from one capture, each once."""

    def __init__(self, root: Path) -> None:
        from lolcats_cli.stages.capture import capture
        from lolcats_cli.teacher.load import LoadOptions
        from lolcats_cli.teacher.records import DataOptions

        data, load = DataOptions(seq_len=512, samples=10), LoadOptions(dtype="float32")
        self.root = root
        self.capture = capture(
            str(TEACHER), str(ASSETS / "text" / "train.jsonl"), root / "cap", options=data, load=load
        )
        self.made: dict[str, Path] = {}

    def make(
        self,
        name: str,
        keep_softmax: tuple[Any, ...] = (),
        windows: tuple[int, ...] | None = None,
        feature_dims: tuple[int, ...] | None = None,
        **hybrid: Any,
    ) -> Path:
        from lolcats_cli.stages.layer_training import TransferOptions
        from lolcats_cli.stages.merge import merge
        from lolcats_cli.stages.transfer import transfer

        if name not in self.made:
            options = TransferOptions(HybridConfig(**hybrid), windows=windows, feature_dims=feature_dims, steps=2)
            maps = transfer(self.capture.path, self.root / f"{name}-maps", options=options, keep_softmax=keep_softmax)
            self.made[name] = merge(maps.path, self.root / name).path
        return self.made[name]


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Students:
    return Students(tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """64 of the held-out text, of 1 to 700 tokens: of every length around the window's 64 and a page's 128, too."""
    from transformers import AutoTokenizer

    lines = (ASSETS / "text" / "validation.jsonl").read_text().splitlines()
    ids = AutoTokenizer.from_pretrained(TEACHER)(" ".join(json.loads(line)["text"] for line in lines[:4]))["input_ids"]
    lengths = [
        1,
        1,
        1,
        2,
        2,
        3,
        4,
        7,
        *range(60, 70),
        *range(125, 133),
        191,
        192,
        193,
        255,
        256,
        257,
        320,
        500,
        512,
        700,
    ]
    rng = torch.Generator().manual_seed(0)
    lengths += torch.randint(5, 300, (64 - len(lengths),), generator=rng).tolist()
    starts = torch.randint(0, len(ids) - 700, (64,), generator=rng).tolist()
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="session")
def answers(prompts: list[list[int]]) -> Any:
    """answers(folder, max_tokens): transformers' greedy answers to the prompts, in batches of about one length."""
    from transformers import AutoModelForCausalLM

    found: dict[tuple[Path, int], list[list[int]]] = {}

    def answer(folder: Path, max_tokens: int) -> list[list[int]]:
        if (folder, max_tokens) not in found:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            length = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
            rows: dict[int, list[int]] = {}
            order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
            for begin in range(0, len(order), 8):
                some = order[begin : begin + 8]
                most = max(len(prompts[number]) for number in some)
                ids = torch.tensor([[0] * (most - len(prompts[n])) + prompts[n] for n in some])
                mask = torch.tensor([[0] * (most - len(prompts[n])) + [1] * len(prompts[n]) for n in some])
                made = model.generate(ids, attention_mask=mask, do_sample=False, **length)
                rows |= dict(zip(some, made[:, -max_tokens:].tolist(), strict=True))
            found[folder, max_tokens] = [rows[number] for number in range(len(prompts))]
        return found[folder, max_tokens]

    return answer
