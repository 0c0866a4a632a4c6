"""Folding an adapter (a plain PEFT folder) into weights, one tensor at a time.

An adapter changes weights by LoRA, or holds other weights in their place (PEFT's `modules_to_save`). LoRA:

W' = W + s · (B @ A), with s = alpha / r, or alpha / sqrt(r) for rsLoRA. DoRA (arXiv 2402.09353) then scales the row of
each output to its learned length, m · W' / |W'|. Everything is computed in fp32 and rounded once.
An adapter that is not fully understood is refused, because a fold that leaves something out gives another model.

Shapes: r rank, I input features, O output features.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.identity import read_object

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
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
    "modules_to_save",
}
# Other initialisations (PiSSA, OLoRA, LoftQ, CorDA …) change the base weights when training starts.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
BLOCK_ELEMENTS = 2**18  # folded at a time. In fp32 they stay in the processor's cache, and a whole weight would not
FOLDABLE = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK, MAX_ALPHA = 65536, 1e9
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")
# The keys of rank_pattern and alpha_pattern that are accepted: a module's name, or the end of a name behind a dot. PEFT
# accepts any regular expression, and one from a file could run for ever.
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


class Adapter:
    """An adapter that is read from `folder`. It knows which weights it changes, and by how much.

    Tensors stay in the file until they are used.

    Attributes:
        modules: the names of the tensors of LoRA, by the module that they change.
        replaced: the names of the tensors that take the place of others, by the name of those.

    Raises BadInput naming the field, variant or tensor that cannot be folded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        path = folder / WEIGHTS_FILE
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            self._shapes = {name: self._file.get_slice(name).get_shape() for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} cannot be read ({error}). Adapters are read as safetensors only.") from error
        self.replaced = self._whole()
        self.modules = self._by_module()
        self._scales = {module: self._scaling(module) for module in self.modules}
        for name in self._shapes:
            tensor = self._file.get_tensor(name)
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise BadInput(
                    f"{path}: {name} holds NaN or infinity, or is not of floating point. Train again with a lower --lr."
                )

    @property
    def weights(self) -> set[str]:
        """The names of the weights that change, in the model's state dict."""
        return {*(f"{module}.weight" for module in self.modules), *self.replaced}

    def _scaling(self, module: str) -> float:
        """The factor s of one module, with PEFT's rank and alpha patterns."""
        rank = self._shapes[self.modules[module][0]][0]
        stated = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if rank != stated:
            raise BadInput(f"{self.folder}: The adapter of {module} has rank {rank}. Its configuration says {stated}.")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def fold(self, name: str, weight: Tensor) -> Tensor:
        """The weight `name` with its change added, in the weight's dtype; [O, I], or [I, O] with fan_in_fan_out. One
        that is replaced has any shape.

        Raises BadInput if the shapes do not fit, the weight is quantised, or the result is beyond its dtype.
        """
        if weight.dtype not in FOLDABLE:
            raise BadInput(
                f"{name} is stored as {weight.dtype}. An adapter can be folded into fp32, bf16 or fp16 weights only."
            )
        if name in self.replaced:
            return self._replace(name, weight)
        module = name.removesuffix(".weight")
        a, b, *length = (self._file.get_tensor(key).to(weight.device).float() for key in self.modules[module])
        scaling, transposed = self._scales[module], bool(self.config.get("fan_in_fan_out"))
        changed = [b.shape[0], a.shape[1]] if not transposed else [a.shape[1], b.shape[0]]
        if a.shape[0] != b.shape[1] or list(weight.shape) != changed or any(m.shape != b[:, 0].shape for m in length):
            raise BadInput(
                f"{name} has the shape {list(weight.shape)}. The adapter's B {list(b.shape)} and A {list(a.shape)} do "
                "not fit it, so the adapter belongs to another model."
            )
        base = weight.T if transposed else weight
        result = torch.empty_like(base)
        rows = max(1, BLOCK_ELEMENTS // a.shape[1])
        for i in range(0, len(base), rows):
            folded = (b[i : i + rows] @ a).mul_(scaling).add_(base[i : i + rows])
            if length:
                folded *= (length[0][i : i + rows] / torch.linalg.norm(folded, dim=1))[:, None]
            result[i : i + rows] = folded
        self._check_finite(name, result)
        return (result.T if transposed else result).contiguous()

    def _replace(self, name: str, weight: Tensor) -> Tensor:
        """What takes the place of the weight `name`, in its dtype."""
        found: Tensor = self._file.get_tensor(self.replaced[name])
        if found.shape != weight.shape:
            raise BadInput(
                f"{name} has the shape {list(weight.shape)}, and in the adapter {list(found.shape)}. So the adapter "
                "belongs to another model."
            )
        result = found.to(weight.device, weight.dtype)
        self._check_finite(name, result)
        return result

    def _check_finite(self, name: str, result: Tensor) -> None:
        if not result.isfinite().all():
            raise BadInput(
                f"{self.folder}: With the adapter, {name} holds NaN, or numbers that are too large for {result.dtype}. "
                "Train the adapter again with a lower --lr."
            )

    def fold_into(self, model: nn.Module) -> None:
        """Folds every weight of a model in memory, in place. Raises BadInput for a weight that the model lacks."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in sorted(self.weights):
            if name not in parameters:
                raise BadInput(f"{self.folder} changes {name}, but {type(model).__name__} has no such weight.")
            parameters[name].data.copy_(self.fold(name, parameters[name].data))

    def _whole(self) -> dict[str, str]:
        """For every weight that is replaced, the name of the tensor in the file."""
        saved = tuple(f".{name}" for name in self.config.get("modules_to_save") or ())
        found = {}
        for key in self._shapes:
            module, _, part = key.removeprefix(PREFIX).rpartition(".")
            if key.startswith(PREFIX) and part in ("weight", "bias") and f".{module}".endswith(saved):
                found[f"{module}.{part}"] = key
        lacking = [name for name in saved if not any(f".{key}".rpartition(".")[0].endswith(name) for key in found)]
        if lacking:
            raise BadInput(
                f"{self.folder} lacks the weights of {_shown(lacking[0][1:])}, which its modules_to_save names: the "
                "adapter is incomplete."
            )
        return found

    def _by_module(self) -> dict[str, list[str]]:
        """For every module, the names of its A [r, I] and B [O, r], and with DoRA of the lengths of its rows [O]."""
        parts = ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector"] * bool(self.config.get("use_dora"))]
        modules: dict[str, set[str]] = {}
        for key in self._shapes.keys() - self.replaced.values():
            match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, parts))})", key)
            if not match:
                raise BadInput(
                    f"{self.folder} holds {key}, which merge does not understand. It folds LoRA and DoRA only."
                )
            modules.setdefault(match[1], set()).add(match[2])
        for module, found in modules.items():
            if missing := sorted(set(parts) - found):
                raise BadInput(f"{self.folder} lacks {missing[0]} of {module}: the adapter is incomplete.")
            for part in parts:
                if len(self._shapes[f"{PREFIX}{module}.{part}"]) != (1 if part == "lora_magnitude_vector" else 2):
                    raise BadInput(f"{self.folder}: The {part} of {module} has the wrong number of dimensions.")
        if not modules and not self.replaced:
            raise BadInput(f"{self.folder} holds no LoRA weights.")
        return {module: [f"{PREFIX}{module}.{part}" for part in parts] for module in sorted(modules)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BadInput(f"{folder} has no {CONFIG_FILE}, so it is not a PEFT adapter.")
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} is a {_shown(config.get('peft_type'))} adapter. merge folds LORA only.")
    if config.get("bias", "none") != "none":
        raise BadInput(
            f"{folder} has trained biases (bias={_shown(config['bias'])}), which merge does not fold. "
            "Train with bias='none'."
        )
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise BadInput(
            f"{folder} was started with init_lora_weights={_shown(config['init_lora_weights'])}, which changes the "
            "teacher's weights. Convert it to a plain LoRA with PEFT first."
        )
    for field, value in config.items():
        if value and field not in NEUTRAL | UNDERSTOOD:
            raise BadInput(
                f"{folder} uses {_shown(field)}={_shown(value)}, which merge does not fold. Train a plain LoRA adapter."
            )
    _check_numbers(folder, config)
    return config


def _check_numbers(folder: Path, config: dict[str, Any]) -> None:
    """Raise BadInput unless rank, alpha, their patterns and the switches are what PEFT writes."""
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for key in pattern if isinstance(pattern, dict) else [pattern]:
            if not isinstance(key, str) or not _NAME.fullmatch(key):
                raise BadInput(f"{folder} has {_shown(key)} in its {name}; only names of modules are understood there.")
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise BadInput(f"{folder} has the rank {_shown(rank)}; it must be a whole number from 1 to {MAX_RANK}.")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:  # NaN is not either
            raise BadInput(f"{folder} has the alpha {_shown(alpha)}; it must be a number of at most {MAX_ALPHA:g}.")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in saved):
        raise BadInput(f"{folder} has modules_to_save={_shown(saved)}; it must be a list of names of modules.")
    for name in SWITCHES:
        if type(config.get(name, False)) is not bool:
            raise BadInput(f"{folder} has {name}={_shown(config[name])}; it must be true or false.")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule for names: the first that the module's name is, or ends in at a dot."""
    for name, value in (patterns or {}).items():
        if f".{module}".endswith(f".{name}"):
            return value
    return default
