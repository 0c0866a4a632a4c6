"""The model types of students. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "lolcats_"


def student_type(model_type: str) -> str:
    """The model type of a teacher's students. They have their own, so that without trust_remote_code they do not load
    as the teacher."""
    return PREFIX + model_type


def is_student(config: Mapping[str, Any]) -> bool:
    """Whether a model folder's configuration is a student's."""
    return "lolcats" in config and str(config.get("model_type")).startswith(PREFIX)
