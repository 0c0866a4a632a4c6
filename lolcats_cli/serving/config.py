"""The configuration of a student for vLLM, and the checks that run before any weights are loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from lolcats_cli import __version__
from lolcats_cli.student.types import PREFIX, student_type

# The minor versions of vLLM that the tests ran with. Its internals change between minor versions.
VLLM_VERSIONS = ((0, 32),)
STUDENT_FIELDS = {"hybrid", "layers", "num_heads", "head_dim"}
# The names that configurations of mixtures of experts have for the number of experts.
EXPERT_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


def vllm_is_known() -> bool:
    """Whether the installed vLLM is of a version that students were tested with."""
    return _vllm_version()[:2] in VLLM_VERSIONS


@cache
def placeholder(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class that is registered with transformers for students of a teacher's type.

    There are many types of teachers, and their classes take long to import. So this class imports the real one when a
    configuration is loaded, and not before.
    """

    def from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return student_config_class(model_type).from_dict(config_dict, **kwargs)

    body = {"model_type": student_type(model_type), "from_dict": classmethod(from_dict)}
    return type("StudentConfig", (PreTrainedConfig,), body)


class _Student:
    """The fields and methods that a student's configuration adds to the teacher's class."""

    lolcats: dict[str, Any] | None = None
    sparse_cache_size: int = 0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        _check_versions(config_dict)
        made = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        config = made[0] if isinstance(made, tuple) else made
        if any(getattr(config, name, 0) for name in EXPERT_COUNTS):
            config.architectures = ["LolcatsMoEForCausalLM"]
        # vLLM reads `layer_types`. If all of them were "full_attention", it would take the student for a softmax model.
        config.teacher_layer_types = getattr(config, "layer_types", None)
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        kinds = config.teacher_layer_types or [kind] * config.num_hidden_layers
        converted = set(config.lolcats["layers"])
        config.layer_types = ["linear_attention" if i in converted else kind for i, kind in enumerate(kinds)]
        return made

    def teacher_window(self, layer: int) -> int | None:
        """The sliding window of the teacher's attention in a layer."""
        config: Any = self
        kinds, window = config.teacher_layer_types, getattr(config, "sliding_window", None)
        return window if kinds is None or kinds[layer] == "sliding_attention" else None

    def teacher_config(self) -> PreTrainedConfig:
        """The teacher's own configuration, with the changes that vLLM's options made to this one."""
        values = self.to_dict()  # type: ignore[attr-defined]
        values["layer_types"] = values.pop("teacher_layer_types")
        if values["layer_types"] is None:
            del values["layer_types"]
        for name in ("lolcats", "sparse_cache_size", "layers_block_type", "auto_map", "architectures"):
            values.pop(name, None)
        model_type = values.pop("model_type").removeprefix(PREFIX)
        return CONFIG_MAPPING[model_type].from_dict(values)


@cache
def student_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The class of the configurations of students of a teacher's type."""
    name = f"StudentConfig_{model_type}"
    body = {"model_type": student_type(model_type), "__module__": __name__, "__qualname__": name}
    return type(name, (_Student, CONFIG_MAPPING[model_type]), body)


def __getattr__(name: str) -> Any:
    """Finds the classes that `student_config_class` makes by their names. A configuration that is unpickled in another
    process needs this."""
    if name.startswith("StudentConfig_"):
        return student_config_class(name.removeprefix("StudentConfig_"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class OptionChecks:
    """Checks a student and the options of vLLM. vLLM calls these methods after it has resolved its options."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises ValueError for a student that vLLM cannot serve."""
        config = model_config.hf_config
        if getattr(config, "sparse_cache_size", 0):
            raise ValueError(
                f"vLLM does not serve the sparse cache (sparse_cache_size={config.sparse_cache_size}). Set it to 0, or "
                "generate with transformers."
            )
        student = config.lolcats
        if isinstance(student["num_heads"], list):
            from lolcats_kernels.spec import layer_config

            total = config.num_attention_heads
            key_heads = getattr(config, "num_key_value_heads", None) or total
            alike = {i: layer_config(student["hybrid"], i).mapped_heads(total, key_heads) for i in student["layers"]}
        else:
            alike = mapped_heads(student)
        if mapped_heads(student) != alike or isinstance(student["head_dim"], list):
            raise ValueError("vLLM does not serve students whose layers differ in their heads. Use transformers.")
        if config.get_text_config() is not config:
            raise ValueError(
                f"vLLM serves students of plain language models, and {config.model_type} also takes other inputs than "
                "text. Use transformers."
            )
        if getattr(config, "kv_lora_rank", None) is not None:
            raise ValueError(
                f"vLLM does not serve students of teachers with latent attention (MLA), such as {config.model_type}. "
                "Use transformers."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError for options that cannot work with students."""
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "Speculative decoding removes tokens from the state again, which a student's state does not allow. "
                "Leave out --speculative-config."
            )
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        if cache.enable_prefix_caching and cache.mamba_cache_mode == "all":
            raise ValueError("Prefix caching of students does not work with --mamba-cache-mode all. Choose align.")
        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
            if getattr(cache, name) not in ("auto", "float32"):
                raise ValueError(f"A student's state is kept in float32. Leave out --{name.replace('_', '-')}.")
        if parallel.tensor_parallel_size > 1 and vllm_config.model_config.hf_config.lolcats["hybrid"].get("kept_heads"):
            raise ValueError(
                "Single heads keep softmax attention in this student, and vLLM cannot share them out among processes. "
                "Leave out --tensor-parallel-size."
            )
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ValueError(
                "A student's state cannot be split along the context. Leave out --decode-context-parallel-size and "
                "--prefill-context-parallel-size."
            )


def mapped_heads(student: dict[str, Any]) -> dict[int, int]:
    """By converted layer the number of query heads that have maps, of a configuration's `lolcats`."""
    counts = student["num_heads"]
    counts = counts if isinstance(counts, list) else [counts] * len(student["layers"])
    return dict(zip(student["layers"], counts, strict=True))


def _check_versions(config: dict[str, Any]) -> None:
    """Raises ValueError for a vLLM that this lolcats was not tested with, or a student that a newer lolcats made."""
    if not vllm_is_known():
        import vllm

        known = " and ".join(f"{major}.{minor}" for major, minor in VLLM_VERSIONS)
        kind = "older" if _vllm_version() < VLLM_VERSIONS[0] else "newer"
        raise ValueError(
            f"lolcats {__version__} serves students with vLLM {known}, and vLLM {vllm.__version__} is {kind}. Install "
            f"vllm=={known}.*" + (", or a newer lolcats." if kind == "newer" else ".")
        )
    student = config.get("lolcats")
    if not isinstance(student, dict) or not student.keys() >= STUDENT_FIELDS:
        raise ValueError("config.json does not describe a merged student. Merge it again.")
    from lolcats_kernels.spec import layer_config

    unknown = sorted(student.keys() - STUDENT_FIELDS)
    try:
        layer_config(student["hybrid"], max(student["layers"]))
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        unknown.append(str(error).rstrip("."))
    if unknown:
        raise ValueError(
            f"A newer lolcats than {__version__} made this student. This lolcats does not know these entries of its "
            f"config.json: {', '.join(unknown)}. Install a newer lolcats."
        )


def _vllm_version() -> tuple[int, ...]:
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
