"""A student in memory from a transfer or LoRA artifact, and the teacher that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats_formats import Artifact
from lolcats_kernels.hf_attention import HybridAttention
from torch import Tensor

from lolcats_cli.artifacts.maps import hybrid_configs, kept_layers, maps_file, recorded_heads
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.student.build import check_shapes, linearize
from lolcats_cli.student.fold import CONFIG_FILE, WEIGHTS_FILE, Adapter
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import LoadOptions, load_model, resolve_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def teacher_folder(artifact: Artifact, override: str | None = None) -> Path:
    """The folder of the artifact's teacher. It is compared with the teacher that was captured.

    Raises `BadInput` if the folder is not there, `IdentityMismatch` if it holds another model.
    """
    folder = resolve_folder(override or str(identity.recorded_folder(artifact.teacher, artifact.path)))
    identity.check(artifact.teacher, folder)
    return folder


def load_captured(capture: Artifact, override: str | None, load: LoadOptions, progress: Progress) -> PreTrainedModel:
    """The teacher of a capture, on the CPU, in the dtype that it was captured in. Raises as `teacher_folder` does."""
    folder = teacher_folder(capture, override)
    progress.note(f"loading {folder}")
    return load_model(folder, replace(load, dtype=capture.config["dtype"], device="cpu"))


def check_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises `BadInput`, naming the tensor, for maps that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{file}: {name} holds NaN or infinity. Train the layer again, with a lower --lr.")


def load_adapter(artifact: Artifact) -> Adapter:
    """The adapter of a LoRA artifact. Its bytes are checked. Raises `BadInput` if it cannot be folded."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        artifact.check(f"adapter/{name}")
    return Adapter(artifact.path / "adapter")


def load_hybrids(artifact: Artifact) -> dict[int, HybridAttention]:
    """By layer, the hybrid attention that a transfer holds, without a model around it.

    Raises `BadInput` for maps that are not finite, `IdentityMismatch` for maps that do not fit the teacher.
    """
    maps = _load_maps(artifact)
    configs, heads, hybrids = hybrid_configs(artifact, maps), recorded_heads(artifact, maps), {}
    for layer, tensors in maps.items():
        hybrids[layer] = HybridAttention(configs[layer], *heads[layer], layer)
        check_shapes(layer, tensors, hybrids[layer].state_dict())
        hybrids[layer].load_state_dict(tensors)
    return hybrids


def load_student(artifact: Artifact, folder: Path, load: LoadOptions) -> PreTrainedModel:
    """The teacher in `folder` with the artifact's hybrid attentions (and without its adapter, if it has one)."""
    maps = _load_maps(artifact)
    hybrids, heads = hybrid_configs(artifact, maps), recorded_heads(artifact, maps)
    return linearize(load_model(folder, load), hybrids, maps, kept_layers(artifact), heads)


def _load_maps(artifact: Artifact) -> dict[int, dict[str, Tensor]]:
    """By layer, the tensors of its maps. Raises `BadInput` unless they are finite."""
    files = {i: maps_file(i) for i in range(len(artifact.teacher["layers"])) if maps_file(i) in artifact.files}
    maps = {layer: artifact.load(name) for layer, name in files.items()}
    for layer, tensors in maps.items():
        check_finite(artifact.path / files[layer], tensors)
    return maps


def check_on_devices(model: PreTrainedModel, reason: str) -> None:
    """Raises `UsageError`, with the reason, if a device map leaves weights on the CPU or disk until they are used."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UsageError(f"--device-map keeps {name} away from the devices that compute, and {reason}.")
