"""Training the projections of the attentions in full rank, and the folder of PEFT that holds the result.

A weight in bf16 or fp16 is trained as an fp32 copy: steps of the optimizer are smaller than what 16 bits resolve. The
student computes with the copy rounded to its own dtype, and that is what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lolcats_cli.student.build import linear_layers
from lolcats_cli.student.fold import PREFIX, WEIGHTS_FILE


class _Rounded(nn.Module):
    """Makes of the fp32 copy what the model computes with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def targeted(student: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that are called so or whose names end so, by name."""
    ends = tuple(f".{target}" for target in targets)
    chosen = linear_layers(student)
    return {name: module for name, module in student.named_modules() if name in chosen and f".{name}".endswith(ends)}


def train_in_full(student: nn.Module, targets: Sequence[str]) -> int:
    """Lets every weight and bias of these layers be trained, and no other parameter; -> how many numbers that are."""
    student.requires_grad_(False)
    number = 0
    for module in targeted(student, targets).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
            parametrize.register_parametrization(module, name, _Rounded(parameter.dtype), unsafe=True)
            number += parameter.numel()
    return number


def save_full_adapter(student: nn.Module, targets: Sequence[str], folder: Path) -> None:
    """Writes a folder that PEFT loads: an adapter without LoRA, whose `modules_to_save` are the trained layers.

    Their weights and biases are written as the student computes with them.
    """
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{PREFIX}{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in targeted(student, targets).items()
        for part in layer.parametrizations  # type: ignore[union-attr]
    }
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config = LoraConfig(
        target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(targets), task_type="CAUSAL_LM", inference_mode=True
    )
    config.save_pretrained(str(folder))
