"""Makes what a merged folder holds besides weights: its code, its configuration and its model card."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any

from lolcats_kernels.spec import layer_config

from lolcats_cli.errors import BadInput
from lolcats_cli.student.types import student_type
from lolcats_cli.teacher.load import class_name

AUTO_MAP = {
    "AutoConfig": "configuration_lolcats.LolcatsConfig",
    "AutoModelForCausalLM": "modeling_lolcats.LolcatsForCausalLM",
}
# Types that are encoders unless their configuration has `is_decoder`.
ENCODERS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
BASE_MAP = {"AutoModel": "modeling_lolcats.LolcatsModel"}


def base_class(model_type: str) -> str | None:
    """The teacher's class without a head, if transformers has one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name = MODEL_MAPPING_NAMES.get(model_type)
    return name if isinstance(name, str) and hasattr(transformers, name) else None


def code_files(config_class: str, model_class: str, model_type: str) -> dict[str, str]:
    """The code of a merged folder: file name -> text: all of `lolcats_kernels` as it is, but what it says of the
    teacher.

    config_class, model_class: the teacher's classes, importable from transformers. model_type: the teacher's.
    """
    teacher = [
        '"""Whose student this is: its classes in transformers."""',
        "",
        f"CONFIG_CLASS = {json.dumps(config_class)}",
        f"MODEL_CLASS = {json.dumps(model_class)}",
        f"BASE_CLASS = {base_class(model_type)!r}",
        f"MODEL_TYPE = {json.dumps(model_type)}",
        "",
    ]
    folder = resources.files("lolcats_kernels")
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".py")}
    del files["__init__.py"]  # transformers makes a package of the folder
    return dict(sorted((files | {"teacher.py": "\n".join(teacher)}).items()))


def teacher_classes(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """(configuration class, causal-LM class) of a teacher's config.json, both importable from transformers.

    Raises BadInput for a model that transformers' own causal-LM classes do not serve, or a quantised one.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = str(config.get("model_type"))
    if config.get("quantization_config"):
        raise BadInput(f"The weights of {where} are quantised. Give the folder or hub id of the unquantised model.")
    if config.get("is_encoder_decoder"):
        raise BadInput(f"{where} is an encoder with a decoder ({model_type}). lolcats converts decoders only.")
    if not config.get("is_decoder") and model_type in ENCODERS:
        raise BadInput(
            f"{where} is an encoder ({model_type}): its tokens see all others. lolcats converts decoders only."
        )
    config_class, found = CONFIG_MAPPING_NAMES.get(model_type), class_name(config)
    if isinstance(config_class, str) and found is not None and hasattr(transformers, found[1]):
        return config_class, found[1]
    if config.get("auto_map"):
        raise BadInput(
            f"{where} is a model with code of its own (auto_map). transformers has no class for its model_type "
            f"{model_type!r}, and a merged folder cannot hold such code."
        )
    kind = "is not a causal language model" if model_type in CONFIG_MAPPING_NAMES else "is not known to transformers"
    raise BadInput(f"{where} has the model_type {model_type!r}, which {kind}. lolcats converts causal language models.")


def student_config(
    teacher: Mapping[str, Any],
    hybrid: Mapping[str, Any],
    *,
    attentions: Collection[int],
    heads: Mapping[int, tuple[int, int]],
    dtype: str,
) -> dict[str, Any]:
    """config.json of the student.

    attentions: the layers of the teacher that have softmax attention.
    heads: by layer with maps, the number of query heads that have some, and the size of their queries; the others keep
        softmax.
    dtype: of the weights, for teachers whose configuration does not say.
    """
    config = {key: value for key, value in teacher.items() if key not in ("_name_or_path", "torch_dtype")}
    config["dtype"] = teacher.get("dtype") or teacher.get("torch_dtype") or dtype
    config["model_type"] = student_type(teacher["model_type"])
    config["architectures"] = ["LolcatsForCausalLM"]
    config["auto_map"] = AUTO_MAP | (BASE_MAP if base_class(teacher["model_type"]) else {})
    found = class_name(teacher)
    if found is not None:
        config["auto_map"] |= {found[0]: AUTO_MAP["AutoModelForCausalLM"]}
    config["lolcats"] = {
        "hybrid": dict(hybrid),
        "layers": list(heads),
        "num_heads": _once([count for count, _ in heads.values()]),
        "head_dim": _once([size for _, size in heads.values()]),
    }
    if sorted(attentions) == list(range(len(attentions))) and not _has_layer_kinds(teacher["model_type"]):
        # What servers read.
        kinds = ["linear_attention" if layer in heads else "attention" for layer in range(len(attentions))]
        config["layers_block_type"] = kinds
    return config


def _has_layer_kinds(model_type: str) -> bool:
    """Whether configurations of a type give `layers_block_type` a meaning of their own: models that have, or may have,
    layers of other kinds."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return hasattr(kind, "layers_block_type") or "layers_block_type" in (kind.attribute_map or {})


def _once(values: list[int]) -> int | list[int]:
    """The value, if all are the same."""
    return values[0] if len(set(values)) == 1 else values


def generation_config(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of the student: the teacher's, without its choice of a growing cache."""
    return {key: value for key, value in teacher.items() if key not in ("cache_implementation", "cache_config")}


def model_card(
    *,
    teacher: Mapping[str, Any],
    hybrid: Mapping[str, Any],
    kept: Sequence[int],
    lineage: Sequence[tuple[str, str]],
    figures: Sequence[tuple[str, str, str]],
    layers: Mapping[int, Mapping[str, float]],
    memory: tuple[str, str],
    has_tokenizer: bool,
) -> str:
    """README.md of a merged folder.

    kept: the layers that stay softmax. lineage: (kind, id) of each artifact from the source backwards. figures: (stage,
    name, value) of their results. layers: a transfer's figures by layer. memory: what the student and its teacher
    keep of 32,768 tokens, in words.
    """
    base = teacher.get("name") or teacher.get("architecture", "the teacher")
    configs = [layer_config(hybrid, layer) for layer in range(len(teacher["layers"])) if layer not in kept]
    heads = [f"{layer}.{head}" for layer, kept_heads in hybrid.get("kept_heads", {}).items() for head in kept_heads]
    most, where = "most of " if kept or heads else "", "in those " if heads else "in those layers " if kept else ""
    windows = [config.window for config in configs]
    window = f"{_span(windows)} ({hybrid['layout']})" if any(windows) else "none (pure linear attention)"
    steps = [f"- {kind}: `{artifact_id}`" for kind, artifact_id in lineage]
    load = [
        "```python",
        "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""),
        'model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)',
        *['tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)'] * has_tokenizer,
        "```",
    ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lolcats, linear-attention]",
        "---",
        f"# {base}, linearized with LoLCATs",
        "",
        f"A causal language model with {most}its softmax attentions replaced by hybrid linear",
        f"attention: its memory {where}does not grow with the context while",
        "generating. Made with `lolcats`.",
        "",
        "## Load",
        "",
        *load,
        "",
        "## What it is",
        "",
        f"- teacher: {teacher.get('architecture')}, weights SHA-256 `{teacher.get('weights_sha256')}`",
        f"- feature map: {hybrid['feature_map']}, size {_span([x.feature_dim for x in configs])}",
        f"- softmax window: {window}; linear factor: {hybrid['linear_factor']}"
        + ("; with a decay" if hybrid.get("decay") else ""),
        *([f"- layers that stay softmax: {', '.join(map(str, kept))}"] if kept else []),
        *([f"- key heads that stay softmax, as layer.head: {', '.join(heads)}"] if heads else []),
        f"- memory of one sequence of 32,768 tokens: {memory[0]}; the teacher's KV cache takes {memory[1]}",
        "- cached generation equals recomputation; padding is honoured; the cache cannot be rolled back, so assisted",
        "  generation is not possible",
        "",
        "## Lineage",
        "",
        *steps,
        *_results(figures, layers),
        "",
        "## Licence",
        "",
        "The weights derive from the teacher's and stay under its licence; read it before use. The code files in this",
        "folder are under Apache-2.0.",
        "",
        "## Citation",
        "",
        "Zhang, Arora, Chalamala, Wu, Spector, Singhal, Ramesh, Ré: LoLCATs: On Low-Rank Linearizing of Large Language",
        "Models. 2024, arXiv:2410.10254.",
        "",
    ]
    return "\n".join(lines)


def _span(sizes: Sequence[int]) -> str:
    """The sizes of layers, in words."""
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}, by layer"


# A layer's figures in the card: the column's name, and how a value is written.
LAYER_COLUMNS = {
    "relative_mse": ("error", "{:.2%}"),
    "relative_window_mse": ("error of the window alone", "{:.2%}"),
    "heads_off": ("heads off", "{:.0f}"),
    "entropy": ("attention entropy, nats", "{:.3g}"),
}


def _results(figures: Sequence[tuple[str, str, str]], layers: Mapping[int, Mapping[str, float]]) -> list[str]:
    """A table of the stages' results, and one of the layers."""
    lines: list[str] = []
    if figures:
        rows = [f"| {stage} | {name} | {value} |" for stage, name, value in figures]
        lines += ["", "## Results", "", "| stage | | |", "| --- | --- | --- |", *rows]
    columns = {key: value for key, value in LAYER_COLUMNS.items() if any(key in layer for layer in layers.values())}
    if columns:
        names = [name for name, _ in columns.values()]
        lines += ["", "Errors are squared errors of the attention's output, beside the power of the teacher's.", ""]
        lines += ["| layer | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
        for number, layer in layers.items():
            cells = [form.format(layer[key]) if key in layer else "" for key, (_, form) in columns.items()]
            lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return lines
