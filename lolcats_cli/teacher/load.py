"""Loads a teacher from a local folder or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lolcats_cli import ranks
from lolcats_cli.errors import BadInput, UsageError, is_out_of_memory
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.hub import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        dtype: a name of `DTYPES`, or "auto" (the checkpoint's own).
        device: the device for the whole model, unless `shard` or `device_map` spreads it.
        shard: each of several ranks holds a part of the weights, and fetches the rest of a layer when it runs (FSDP2).
        device_map: accelerate's device map: "auto", or devices by module.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    shard: bool = False
    device_map: str | Mapping[str, str | int] | None = None

    def resolved_device(self) -> torch.device:
        """The device. "auto" is CUDA if there is a GPU. With several ranks, each one has its own GPU.

        Raises `UsageError` for a device that does not exist.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if ranks.size() > 1 and name.startswith("cuda:"):
            raise UsageError(f"--device {name} is one device, and there are {ranks.size()} processes. Leave it out.")
        if ranks.size() > 1 and name == "cuda":
            name = f"cuda:{ranks.local_rank()}"
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {name} cannot be used here: {first_line(error)}") from error
        return device


def resolve_folder(teacher: str, revision: str | None = None) -> Path:
    """The folder that `teacher` names, or the local snapshot of the hub model with that id and revision.

    Raises `BadInput` if it is not a folder with weights, and cannot be fetched from the hub.
    """
    folder = identity.local_folder(teacher)
    if folder is not None:
        return folder

    def download() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(teacher, revision=revision, allow_patterns=list(HUB_FILES))

    snapshot = fetch(teacher, download)
    identity.weight_files(snapshot)
    return snapshot


def class_name(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The auto class that loads a model of this configuration as a causal language model, and the class that it finds;
    None if transformers has none. A model around a text model is loaded whole, with its encoders of images."""
    from transformers.models.auto import modeling_auto as auto

    kind = str(config.get("model_type"))
    whole, text = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind),
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
    )
    if whole is not None and whole != text and "text_config" in config:
        return "AutoModelForImageTextToText", str(whole)
    return ("AutoModelForCausalLM", text) if isinstance(text, str) else None


def runs_own_code(folder: Path, allowed: bool) -> bool:
    """Whether the folder's own code (auto_map) is run: if allowed, and if transformers has no class for the model."""
    return allowed and class_name(identity.read_config(folder)) is None


def auto_class(folder: Path) -> Any:
    """The auto class of transformers that loads a folder's model."""
    import transformers

    found = class_name(identity.read_config(folder))
    return getattr(transformers, "AutoModelForCausalLM" if found is None else found[0])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises `BadInput` if it cannot be loaded or used."""
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

    try:
        own_code, given = runs_own_code(folder, trust_remote_code), {}
        if not own_code and (config := identity.read_config(folder)).get("model_type") not in CONFIG_MAPPING:
            # AutoTokenizer would make the same of a student's config.json, and warn that it is another model's.
            given = {"config": PreTrainedConfig.from_dict(config)}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code, **given)
        tokenizer("a")  # settings of a wrong type show when it is used
    except Exception as error:
        raise BadInput(f"{folder} has no tokenizer that transformers can use: {first_line(error)}") from error
    return tokenizer


def load_model(folder: Path, options: LoadOptions, loader: Any = None) -> PreTrainedModel:
    """The folder's causal language model in evaluation mode, on its device. Raises `BadInput` if it cannot be loaded.

    `loader` is the class that loads it, an auto class of transformers unless given.
    """
    device = options.resolved_device()
    placement: dict[str, Any] = {}
    if options.shard:
        if ranks.size() == 1:
            raise UsageError(
                "--shard spreads the weights over several processes, and there is one. Start several with torchrun."
            )
        from transformers.distributed import DistributedConfig

        placement = {"distributed_config": DistributedConfig(fsdp_size=ranks.size())}
    elif options.device_map is not None:
        if ranks.size() > 1:
            raise UsageError("--device-map is for one process. Spread the weights over several with --shard.")
        if options.device.startswith("cuda:"):
            raise UsageError(
                f"--device {options.device} is one device, and --device-map uses all. Leave out one option."
            )
        placement = {"device_map": options.device_map}
    model = _from_pretrained(folder, options, loader or auto_class(folder), placement)
    placed: PreTrainedModel = model if placement else model.to(device)
    placed.eval()
    return placed


def load_outline(folder: Path, options: LoadOptions) -> PreTrainedModel:
    """What `load_model` gives, without reading the weights: parameters on the meta device. Raises `BadInput` too."""
    outline: PreTrainedModel = _from_pretrained(folder, options, auto_class(folder), {"device_map": "meta"})
    return outline


def _from_pretrained(folder: Path, options: LoadOptions, loader: Any, placement: dict[str, Any]) -> Any:
    from transformers.utils.logging import disable_progress_bar

    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UsageError(f"--dtype {options.dtype} is not known. Choose auto, {', '.join(DTYPES)}.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=DTYPES.get(options.dtype, "auto"),
            trust_remote_code=runs_own_code(folder, options.trust_remote_code),
            output_loading_info=True,
            **placement,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{folder} could not be loaded as a causal language model: {first_line(error)}") from error
    if report["missing_keys"]:
        raise BadInput(
            f"The weights in {folder} lack {', '.join(sorted(report['missing_keys'])[:3])}. Download or save the model "
            "again."
        )
    return model


def model_limit(config: Any) -> int | None:
    """The longest sequence the model's configuration allows, in tokens, or None if it states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(seq_len: int, config: Any, model: str) -> None:
    """Raises `BadInput` for rows that are longer than the model's configuration allows. model: what it is called."""
    limit = model_limit(config)
    if limit is not None and seq_len > limit:
        raise BadInput(
            f"--seq-len {seq_len} is over the {limit} tokens that {model} was made for. Choose at most that."
        )


def longrope_limit(config: Any) -> int | None:
    """The tokens up to which a model with RoPE of type "longrope" rotates by its short factors; None for others."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def indexer_limit(config: Any) -> int | None:
    """How many keys a query sees where an indexer chooses them (DeepSeek's sparse attention); None for others."""
    text = config.get_text_config()
    return getattr(text, "index_topk", None) or getattr(text, "indexer_budget", None)


def first_line(error: Exception) -> str:
    """What an error says in its first line, with a full stop; the name of its type if it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith((".", "!", "?")) else f"{line.rstrip(' :;,')}."
