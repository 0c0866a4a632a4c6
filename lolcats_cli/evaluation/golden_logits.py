"""Golden logits: what a merged student answers to a few prompts, kept beside its weights; `verify` computes them again.

Hashes show that a folder's bytes are right. This shows that the software and the machine where the folder lies make the
same model of them. Weights are read module by module from the folder, so a model need not fit into memory.

Shapes: P prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from lolcats_formats import GOLDEN, Artifact
from lolcats_kernels.hf_student import attention_modules
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils.logging import disable_progress_bar

from lolcats_cli.artifacts.disk import check_space
from lolcats_cli.errors import BadInput, LolcatsError
from lolcats_cli.loading.merged import student_class
from lolcats_cli.teacher import identity
from lolcats_cli.teacher.load import first_line, load_tokenizer, model_limit

PROMPTS = (
    "The sea was calm that morning, and nobody on board had slept. The captain counted the boats twice, then again",
    "To linearize a model, replace the softmax of each attention by a product of feature maps, and train these so that",
)
BEYOND = 8  # tokens more than the window holds, so that the linear term has its say
# The largest error, relative to the spread of the golden logits, by the dtype that the student is computed in: machines
# round differently, and the differences grow from layer to layer.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def golden(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """The golden logits of the student in `folder`: `input_ids` [P, T] and the `logits` [P, V] after the last of them.

    scratch: where weights are laid out anew of models whose modules hold them in another form than their files do.
    Raises BadInput if they are no numbers.
    """
    kind = student_class(folder)
    config = kind.config_class.from_pretrained(folder)
    length = config.lolcats["hybrid"]["window"] + BEYOND
    length = min(length, model_limit(config) or length)
    prompts = _tokens(folder, config.get_text_config().vocab_size)
    input_ids = torch.tensor([(ids * length)[:length] for ids in prompts])
    logits = _logits(kind, folder, input_ids, scratch)[0]
    if not logits.isfinite().all():
        raise BadInput(
            f"The student in {folder} answers two prompts with NaN or infinity, so it is not finished: its weights "
            "overflow, or the training diverged. Train again with a lower --lr."
        )
    return {"input_ids": input_ids, "logits": logits}


def try_one_block(folder: Path, scratch: Path) -> None:
    """Compute logits of the student in `folder` as `golden` does, with its layers cut off behind the first attention.

    Raises BadInput, with the reason, if that cannot be done.
    """
    whole: Any = student_class(folder)

    class FirstBlock(whole):  # type: ignore[misc, valid-type]
        config_class, __module__ = whole.config_class, whole.__module__

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            stack, number = _place(self)
            del self.get_submodule(stack)[number + 1 :]
            # What the files hold of the other layers is no cause for a warning.
            self._keys_to_ignore_on_load_unexpected |= {r"\.\d+\."}

    length = whole.config_class.from_pretrained(folder).lolcats["hybrid"]["window"] + BEYOND
    try:
        logits, _ = _logits(FirstBlock, folder, torch.ones(1, length, dtype=torch.int64), scratch)
    except Exception as error:
        raise BadInput(f"A student of this teacher cannot be run: {first_line(error)}") from error
    if not logits.isfinite().all():
        raise BadInput("A student of this teacher gives logits that are NaN or infinite after its first layers.")


def check_saved_again(folder: Path) -> dict[str, Any]:
    """What `verify` tells of a student that was saved again: no manifest says how its bytes or its answers should be.

    Raises BadInput if weights are missing, or if it does not answer with numbers.
    """
    files = identity.weight_files(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            golden(folder, Path(scratch))
        except LolcatsError:
            raise
        except Exception as problem:
            raise BadInput(f"The student in {folder} cannot be run here: {first_line(problem)}") from problem
    return {"kind": "student", "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def check(artifact: Artifact) -> float:
    """The error of a student's logits here, relative to the spread of its golden ones.

    Raises BadInput if it is beyond what rounding explains, or if the golden file is no such file.
    """
    found = artifact.load(GOLDEN)
    where = artifact.path / GOLDEN
    input_ids, expected = _checked(found, where)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            logits, dtype = _logits(student_class(artifact.path), artifact.path, input_ids, Path(scratch))
    except Exception as problem:
        if isinstance(problem, LolcatsError):
            raise
        raise BadInput(f"The student in {artifact.path} cannot be run here: {first_line(problem)}") from problem
    if logits.shape != expected.shape:
        raise BadInput(f"{where} is of a vocabulary of {expected.shape[1]}; the student has {logits.shape[1]}.")
    error = ((logits - expected).square().mean().sqrt() / expected.std()).item()
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:  # NaN is an error too
        import transformers

        raise BadInput(
            f"The student in {artifact.path} answers otherwise than when it was merged: its logits differ from those "
            f"in {GOLDEN} by {error:.2g} of their spread; rounding explains {tolerance:g} at most. Its files are "
            f"intact: torch {torch.__version__}, transformers {transformers.__version__} or this machine computes "
            f"something else than {artifact.manifest['created']['tool']} did. Try the versions it was merged with."
        )
    return error


def _tokens(folder: Path, vocabulary: int) -> list[list[int]]:
    """The prompts by the student's tokenizer; their bytes if it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return [[byte % vocabulary for byte in prompt.encode()] for prompt in PROMPTS]
    tokenizer = load_tokenizer(folder)
    return [tokenizer(prompt)["input_ids"] or [0] for prompt in PROMPTS]


@torch.no_grad()
def _logits(kind: Any, folder: Path, input_ids: Tensor, scratch: Path) -> tuple[Tensor, torch.dtype]:
    """Those after the last token [P, V], in fp32, computed on the CPU; and the dtype of the computation.

    Weights are mapped from their files. Where modules hold them in another form, as those of experts, the layers are
    laid out anew on the disk, and stay there until they are run.
    """
    disable_progress_bar()
    steps = get_checkpoint_conversion_mapping(kind.config_class.model_type) or ()
    if any(isinstance(step, WeightConverter) for step in steps):
        model = _offloaded(kind, folder, scratch)
    else:
        model = kind.from_pretrained(folder, dtype="auto")
    out = model.eval()(input_ids, use_cache=False).logits[:, -1]
    return out.float().contiguous(), out.dtype


def _offloaded(kind: Any, folder: Path, scratch: Path) -> Any:
    """A student whose layers lie on the disk; what is around them is loaded, as code of some models asks where the
    embeddings lie."""
    with torch.device("meta"):
        stack, _ = _place(skeleton := kind(kind.config_class.from_pretrained(folder)))
    size = sum(file.stat().st_size for file in identity.weight_files(folder))
    check_space(size, scratch, "The weights of experts are laid out anew there for a while.")
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that weights stay on the disk is the point
    try:
        return kind.from_pretrained(folder, dtype="auto", device_map=_devices(skeleton, stack), offload_folder=scratch)
    finally:
        logger.setLevel(level)


def _place(model: nn.Module) -> tuple[str, int]:
    """Where the first attention of a model lies: the name of the list of layers, and the number of the layer in it."""
    first = attention_modules(model)[0]
    name = next(name for name, module in model.named_modules() if module is first)
    parts = name.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:number]), int(parts[number])


def _devices(model: nn.Module, stack: str) -> dict[str, str]:
    """Where the parts of a model lie while it runs: the layers in `stack` on the disk, the others in memory."""
    found = {f"{stack}.{name}": "disk" for name, _ in model.get_submodule(stack).named_children()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if not name.startswith(f"{stack}."):
            part = name.rpartition(".")[0]
            found[name if f"{stack}.".startswith(f"{part}.") or not part else part] = "cpu"
    return found


def _checked(found: dict[str, Tensor], where: Path) -> tuple[Tensor, Tensor]:
    """(input_ids, logits). Raises BadInput unless they are what `golden` makes."""
    message = f"{where} does not hold input_ids [prompts, tokens] and logits [prompts, vocabulary]."
    if set(found) != {"input_ids", "logits"}:
        raise BadInput(message)
    input_ids, logits = found["input_ids"], found["logits"]
    if (
        (input_ids.dtype, logits.dtype) != (torch.int64, torch.float32)
        or not input_ids.ndim == logits.ndim == 2
        or len(input_ids) != len(logits)
        or 0 in (*input_ids.shape, *logits.shape)
        or not 0 <= input_ids.min() <= input_ids.max() < logits.shape[1]
    ):
        raise BadInput(message)
    return input_ids, logits
