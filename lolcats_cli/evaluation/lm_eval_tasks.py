"""eval --tasks: the tasks of EleutherAI's lm-evaluation-harness, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.loading.any_model import Loaded

# The paper's six tasks (arXiv 2410.10254), each with the number of worked examples before a question.
PAPER = {"piqa": 0, "arc_easy": 0, "arc_challenge": 0, "hellaswag": 0, "winogrande": 0, "mmlu": 5}

Tasks = dict[str, list[Any]]  # the harness's tasks or groups, by the name that was asked for


def load_tasks(names: Sequence[str]) -> Tasks:
    """The tasks of these names or YAML files, with their data. The name "paper" stands for the tasks in PAPER.

    The data comes from the hub if it is not in the cache. Raises UsageError if lm_eval is not installed or does not
    know a name, and BadInput if the data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"--tasks needs lm_eval ({error}). Install it with: pip install 'lolcats[eval]'.") from error
    manager, tasks = TaskManager(), {}
    for name in [task for given in names for task in (PAPER if given == "paper" else [given])]:
        try:
            found = manager.load(name)
        except KeyError as error:
            raise UsageError(
                f"--tasks {name} is neither a task of lm_eval (`lm_eval ls tasks` lists them) nor the YAML file of one."
            ) from error
        except Exception as error:
            raise BadInput(
                f"The data of the task {name} cannot be read from the Hugging Face hub or from its cache: {error}. "
                "Check the network and HF_HUB_OFFLINE. Or run the task on a computer with a network, and copy its "
                "~/.cache/huggingface here."
            ) from error
        group = found["groups"].get(name)
        tasks[name] = [group] if group is not None else list(found["tasks"].values())
    return tasks


def run_tasks(
    loaded: Loaded, tasks: Tasks, *, samples: int | None, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures by task: `shots`, and what the harness measures, such as `acc` and `acc_stderr`.

    samples: the largest number of questions of each task; None for all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    results: dict[str, dict[str, Any]] = {}
    for name, items in tasks.items():
        shots = PAPER.get(name)
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
        found = simple_evaluate(model, tasks=items, num_fewshot=shots, limit=samples, log_samples=False, **seeds)
        for task, figures in {**found["results"], **found.get("groups", {})}.items():
            named = {key.removesuffix(",none").replace(",none", ""): value for key, value in figures.items()}
            numbers = {key: value for key, value in named.items() if isinstance(value, float)}
            results[task] = {"shots": found["n-shot"].get(task, shots), **numbers}
    return results
