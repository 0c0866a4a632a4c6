"""Folding a LoRA adapter (a plain PEFT folder) into weights, one tensor at a time.

W' = W + s · (B @ A), with s = alpha / r, or alpha / sqrt(r) for rsLoRA; DoRA (arXiv 2402.09353) then scales each
output's row to its learned length, m · W' / |W'|. All in fp32, rounded once.
Whatever this does not understand is refused: a fold that leaves something out would be another model.

Shapes: r rank, I input features, O output features.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lolcats_cli.errors import BadInput

PREFIX = "base_model.model."
# Fields that do not change what the stored tensors mean.
NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "runtime_config", "eva_config", "loftq_config", "ensure_weight_tying",
}  # fmt: skip
UNDERSTOOD = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
}
# Other initialisations (PiSSA, OLoRA, LoftQ, CorDA …) change the base weights when training starts.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
BLOCK_ELEMENTS = 2**18  # folded at a time: in fp32 they stay in the processor's cache, a whole weight would not
FOLDABLE = (torch.float32, torch.bfloat16, torch.float16)


class Adapter:
    """A LoRA adapter read from `folder`: which weights it changes, and by how much.

    Raises BadInput naming the field, variant or tensor that cannot be folded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        path = folder / "adapter_model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} cannot be read ({error}). Adapters are read as safetensors only.") from error
        self.modules = self._by_module()

    @property
    def weights(self) -> set[str]:
        """The names of the weights that change, as the model's state dict has them."""
        return {f"{module}.weight" for module in self.modules}

    def scaling(self, module: str) -> float:
        """s of one module, with PEFT's rank and alpha patterns."""
        rank = self._tensors[self.modules[module][0]].shape[0]
        stated = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if rank != stated:
            raise BadInput(f"{self.folder}: the adapter of {module} has rank {rank}, its configuration says {stated}.")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        """The weight `name` with its delta added, in the weight's dtype; [O, I], or [I, O] with fan_in_fan_out.

        Raises BadInput if the shapes do not fit or the weight is quantised.
        """
        if weight.dtype not in FOLDABLE:
            raise BadInput(
                f"{name} is stored as {weight.dtype}; an adapter folds into fp32, bf16 or fp16 weights only."
            )
        module = name.removesuffix(".weight")
        a, b, *length = (self._tensors[key].float() for key in self.modules[module])
        scaling, transposed = self.scaling(module), bool(self.config.get("fan_in_fan_out"))
        changed = [b.shape[0], a.shape[1]] if not transposed else [a.shape[1], b.shape[0]]
        if a.shape[0] != b.shape[1] or list(weight.shape) != changed or any(m.shape != b[:, 0].shape for m in length):
            raise BadInput(
                f"{name} is {list(weight.shape)}, the adapter's B {list(b.shape)} and A {list(a.shape)} do not fit it: "
                "it is another model's adapter."
            )
        base = weight.T if transposed else weight
        result = torch.empty_like(base)
        rows = max(1, BLOCK_ELEMENTS // a.shape[1])
        for i in range(0, len(base), rows):
            folded = (b[i : i + rows] @ a).mul_(scaling).add_(base[i : i + rows])
            if length:
                folded *= (length[0][i : i + rows] / torch.linalg.norm(folded, dim=1))[:, None]
            result[i : i + rows] = folded
        return (result.T if transposed else result).contiguous()

    def _by_module(self) -> dict[str, list[str]]:
        """Per module, the names of its A [r, I] and B [O, r], and with DoRA of its rows' lengths [O]."""
        parts = ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector"] * bool(self.config.get("use_dora"))]
        modules: dict[str, set[str]] = {}
        for key in self._tensors:
            match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, parts))})", key)
            if not match:
                raise BadInput(
                    f"{self.folder} holds {key}, which merge does not understand; only LoRA and DoRA are folded."
                )
            modules.setdefault(match[1], set()).add(match[2])
        for module, found in modules.items():
            if missing := sorted(set(parts) - found):
                raise BadInput(f"{self.folder} lacks {missing[0]} of {module}: the adapter is incomplete.")
        if not modules:
            raise BadInput(f"{self.folder} holds no LoRA weights.")
        return {module: [f"{PREFIX}{module}.{part}" for part in parts] for module in sorted(modules)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}): not a PEFT adapter.") from error
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} is a {config.get('peft_type')} adapter; merge folds LORA only.")
    if config.get("bias", "none") != "none":
        raise BadInput(
            f"{folder} trained biases (bias={config['bias']!r}), which merge does not fold. Train with bias='none'."
        )
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise BadInput(
            f"{folder} started with init_lora_weights={config['init_lora_weights']!r}, which changes the teacher's "
            "weights; convert it to a plain LoRA with PEFT first."
        )
    for field, value in config.items():
        if value and field not in NEUTRAL | UNDERSTOOD:
            raise BadInput(f"{folder} uses {field}={value!r}, which merge does not fold. Train a plain LoRA adapter.")
    return config


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
