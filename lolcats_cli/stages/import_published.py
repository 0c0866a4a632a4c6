"""import: takes over checkpoints of the LoLCATs authors' code as transfer and LoRA artifacts.

Such a file is a pickle of {"model_state_dict": trained weights, "step", a metric}. For every layer it has the feature
maps `layers.N.self_attn.feature_map_{q,k}.mlp.layer` [H, D, F] and `window_factors` [1, H, 1, 1] (the logits of γ), or
PEFT's `….lora_{A,B}.default.weight`. It does not state window, layout, feature map or alpha, so these are options.

Source of the names and layouts: github.com/HazyResearch/lolcats, `src/model` and `src/trainer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lolcats_formats import Artifact
from lolcats_formats.place import Resume
from lolcats_kernels import HybridConfig, HybridMaps
from torch import Tensor

from lolcats_cli import ranks
from lolcats_cli.artifacts.maps import kept_config, maps_file
from lolcats_cli.errors import BadInput, IdentityMismatch, UsageError
from lolcats_cli.loading.student import check_finite, teacher_folder
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import describe_teacher, recorded_teacher
from lolcats_cli.stages.writing import Making, check_config, make_artifact
from lolcats_cli.student.build import check_servable
from lolcats_cli.teacher.load import LoadOptions, first_line, load_model, resolve_folder
from lolcats_cli.teacher.record import LayerInfo, probe

EXPECTED = "Give a checkpoint that the LoLCATs authors' code saved."
MAX_NAME = 240  # characters of a tensor's name
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAP = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.self_attn\.(?:feature_map_([qk])\.mlp\.(layer|bias)|(window_factors))$")
_LORA = re.compile(r"^(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight$")


def import_maps(
    checkpoint: Path,
    output: Path | str,
    teacher: str,
    *,
    hybrid: HybridConfig,
    load: LoadOptions = LoadOptions(),
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """A transfer artifact from a checkpoint of attention transfer. Layers without maps keep softmax attention.

    hybrid: the attention that was trained. Its feature size is taken from the checkpoint.

    Raises:
        BadInput: the file is no such checkpoint, or the teacher cannot be linearized.
        IdentityMismatch: the maps do not have the shapes that the teacher and the options need.
    """
    ranks.check_alone("import")
    weights, digest = _read(checkpoint)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _MAP.search(name)
        if match is None:
            raise BadInput(f"{checkpoint} holds {name}, which is neither a feature map nor a window factor. {EXPECTED}")
        layer, side, kind, window = match.groups()
        key = "window_logit" if window else f"{side}_{'weight' if kind == 'layer' else 'bias'}"
        found.setdefault(int(layer), {})[key] = tensor.float()
    sizes = {maps["q_weight"].shape[-1] for maps in found.values() if "q_weight" in maps}
    if hybrid.feature_map == "hedgehog" and len(sizes) == 1:
        hybrid = replace(hybrid, feature_dim=sizes.pop())
    config = {
        "hybrid": hybrid.to_dict(),
        "layers": sorted(found),
        "imported": {"path": str(checkpoint), "sha256": digest},
    }
    folder = resolve_folder(teacher)
    if check_config(output, "transfer", config, force=force, unknown=("keep_softmax",)):
        described = recorded_teacher(output, folder, None)
        infos = [LayerInfo.from_dict(layer) for layer in described["layers"]]
    else:
        model = load_model(folder, load)
        infos = probe(model)
        check_servable(model)
        described = describe_teacher(model, folder, None, infos)
    unknown = sorted(set(found) - set(range(len(infos))))
    if unknown:
        raise IdentityMismatch(
            f"{checkpoint} has maps for layer {unknown[0]}, and {teacher} has {len(infos)} layers. Give the teacher "
            "that it was trained from."
        )
    states = {
        layer: _state(checkpoint, layer, maps, HybridMaps(hybrid, infos[layer].num_heads, infos[layer].head_dim))
        for layer, maps in sorted(found.items())
    }
    kept = sorted(set(range(len(infos))) - set(states))
    fields = {
        "config": {**config, **({"keep_softmax": kept} if kept else {})},
        "teacher": described,
        "data": {"path": str(checkpoint)},
    }

    def work(making: Making) -> dict[str, Any]:
        for layer, state in states.items():
            making.writer.save(maps_file(layer), state)
        progress.note(f"{checkpoint}: maps for {len(states)} layers; {len(kept)} layers keep softmax attention")
        return {"layers": {}}

    return make_artifact(output, "transfer", fields, work, resume=resume, force=force, progress=progress)


def import_adapter(
    checkpoint: Path,
    output: Path | str,
    transfer: Path | str,
    *,
    alpha: float | None = None,
    teacher: str | None = None,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """A LoRA artifact from a checkpoint of low-rank linearizing and the transfer artifact that it goes with.

    alpha: LoRA's alpha; twice the rank by default, as in the authors' configurations.

    Raises:
        BadInput: the file is no such checkpoint.
        IdentityMismatch: the adapter does not fit the teacher.
    """
    parent = Artifact.open(transfer, "transfer")
    folder = teacher_folder(parent, teacher)
    ranks.check_alone("import")
    weights, digest = _read(checkpoint)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _LORA.match(name)
        if match is None:
            raise BadInput(f"{checkpoint} holds {name}, which is not a weight of a LoRA adapter. {EXPECTED}")
        pairs.setdefault(match[1], {})[match[2]] = tensor.contiguous()
    found_ranks = {pair["lora_A"].shape[0] for pair in pairs.values() if "lora_A" in pair}
    if len(found_ranks) != 1 or 0 in found_ranks or any(pair.keys() != {"lora_A", "lora_B"} for pair in pairs.values()):
        raise BadInput(
            f"{checkpoint} does not hold LoRA's A and B for every module, with the same rank in all of them."
        )
    _check_adapter(checkpoint, folder, pairs)
    rank = found_ranks.pop()
    config = {
        "rank": rank,
        "alpha": float(2 * rank if alpha is None else alpha),
        "targets": sorted({name.rsplit(".", 1)[-1] for name in pairs}),
    }
    attention = {"hybrid": parent.config["hybrid"], **kept_config(parent)}
    fields = {
        "config": {**config, **attention, "imported": {"path": str(checkpoint), "sha256": digest}},
        "teacher": parent.teacher,
        "data": {"path": str(checkpoint)},
        "parents": [parent],
    }

    def work(making: Making) -> dict[str, Any]:
        for name in sorted(file for file in parent.files if file.startswith("maps/")):
            making.writer.copy(name, (parent, name))
        tensors = {f"base_model.model.{m}.{name}.weight": t for m, pair in pairs.items() for name, t in pair.items()}
        making.writer.save("adapter/adapter_model.safetensors", tensors)
        making.writer.write_json("adapter/adapter_config.json", _adapter_config(config))
        progress.note(f"{checkpoint}: LoRA of rank {rank} on {len(pairs)} modules")
        return {"layers": parent.summary.get("layers", {})}

    return make_artifact(output, "lora", fields, work, resume=resume, force=force, progress=progress)


def holds_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a LoRA adapter rather than feature maps. Raises BadInput if it is no checkpoint."""
    return any("lora_" in name for name in _read(checkpoint)[0])


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], str]:
    """The trained weights, in floats of at most 32 bits, and the file's SHA-256."""
    try:
        with checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            _check_stored(checkpoint, file)
            file.seek(0)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
            size = file.seek(0, os.SEEK_END)
    except BadInput:
        raise
    except Exception as error:  # unpickling a file may raise anything, and its words are for programmers
        raise BadInput(f"{checkpoint} is not a checkpoint of tensors alone. {EXPECTED}") from error
    weights = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(x, Tensor) for x in weights.values()):
        raise BadInput(f"{checkpoint} holds no model_state_dict of tensors. {EXPECTED}")
    weights = {_name(checkpoint, name): _floats(checkpoint, name, x, size) for name, x in weights.items()}
    check_finite(checkpoint, weights)
    return weights, digest


def _check_stored(checkpoint: Path, file: BinaryIO) -> None:
    """Raises BadInput for a zip file with compressed records, which could grow without limit. torch has none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as records:
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                raise BadInput(
                    f"{checkpoint} is not a checkpoint of tensors alone: its records are compressed, and torch.save "
                    f"never compresses them. {EXPECTED}"
                )


def _name(checkpoint: Path, name: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise BadInput(
            f"{checkpoint} has a tensor with the name {str(name)[:80]!r}. A name must be a text of at most {MAX_NAME} "
            "characters."
        )
    return name


def _floats(checkpoint: Path, name: str, tensor: Tensor, size: int) -> Tensor:
    """The tensor, in fp32 if it has 64 bits. Raises BadInput for a tensor that cannot be a weight.

    size: the bytes of the file. A larger tensor repeats its numbers, and could have any size.
    """
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized and tensor.ndim > 0
    if not plain or tensor.dtype not in FLOATS or tensor.nbytes > size:
        raise BadInput(
            f"{checkpoint}: {name} cannot be a weight ({str(tensor.dtype).removeprefix('torch.')}, "
            f"{list(tensor.shape)}, {str(tensor.layout).removeprefix('torch.')})."
        )
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _state(checkpoint: Path, layer: int, maps: dict[str, Tensor], like: HybridMaps) -> dict[str, Tensor]:
    """A layer's maps with the names and shapes of `like`. Raises IdentityMismatch if they do not fit."""
    heads = like.num_heads
    if like.config.window == 0 and "window_logit" not in maps:
        maps = {**maps, "window_logit": torch.zeros(heads)}  # without a window it has no effect
    shaped = {
        name: tensor.reshape(heads) if name == "window_logit" and tensor.numel() == heads else tensor
        for name, tensor in maps.items()
    }
    for name in ("q_bias", "k_bias"):  # [1, H, 1, 1] there, one for all columns
        if name in shaped and shaped[name].numel() == heads:
            shaped[name] = shaped[name].reshape(heads, 1).expand(heads, like.num_features)
    got = {name: tuple(tensor.shape) for name, tensor in shaped.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
    if got != wanted:
        raise IdentityMismatch(
            f"The maps of layer {layer} in {checkpoint} are {got}. The teacher and options need {wanted}. "
            "Check --feature-map and --window."
        )
    return {name: tensor.contiguous() for name, tensor in shaped.items()}


def _check_adapter(checkpoint: Path, folder: Path, pairs: dict[str, dict[str, Tensor]]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            modules = dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).named_modules())
    except Exception as error:
        raise BadInput(f"The model in {folder} cannot be built by transformers: {first_line(error)}") from error
    for name, pair in pairs.items():
        shape = tuple(getattr(getattr(modules.get(name), "weight", None), "shape", ()))
        if any(part.ndim != 2 for part in pair.values()) or shape != (len(pair["lora_B"]), pair["lora_A"].shape[1]):
            raise IdentityMismatch(f"{checkpoint} adapts {name}, but {folder} has no such module of that shape.")


def _adapter_config(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's description of a plain LoRA."""
    from peft import LoraConfig

    if config["alpha"] <= 0:
        raise UsageError(f"--alpha is {config['alpha']:g}. It must be above 0.")
    made = LoraConfig(
        r=config["rank"], lora_alpha=config["alpha"], target_modules=config["targets"], task_type="CAUSAL_LM"
    ).to_dict()
    plain = json.dumps(made | {"target_modules": config["targets"]}, default=lambda value: str(value.value))
    described: dict[str, Any] = json.loads(plain)
    return described
