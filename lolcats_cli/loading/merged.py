"""Loads a merged folder with the installed code. Code in the folder is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from lolcats_kernels.hf_student import MergedStudent, share_layout
from transformers import PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.student.export import teacher_classes
from lolcats_cli.student.types import PREFIX, is_student
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import LoadOptions, load_model


def load_merged(folder: Path, load: LoadOptions) -> PreTrainedModel:
    """The student in a merged folder. Raises `BadInput` if its configuration is not one that merge writes."""
    return load_model(folder, load, loader=student_class(folder))


def student_class(folder: Path) -> Any:
    """The class of the student in a merged folder, as the folder's own code would define it. Raises `BadInput`."""
    config = identity.read_config(folder)
    if not is_student(config):
        raise BadInput(f"{folder}/config.json does not describe a merged student. Merge it again.")
    model_type = config["model_type"].removeprefix(PREFIX)
    names = teacher_classes(config | {"model_type": model_type}, str(folder))
    config_class, model_class = (getattr(transformers, name) for name in names)
    # transformers makes a dataclass of a configuration.
    own_config = type("LolcatsConfig", (config_class,), {"model_type": config["model_type"], "lolcats": None})
    body: dict[str, Any] = {"config_class": own_config, "__module__": model_class.__module__}
    own_model = type("LolcatsForCausalLM", (MergedStudent, model_class), body)
    share_layout(config["model_type"], model_class, model_type)
    return own_model
