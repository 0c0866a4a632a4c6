"""lm_eval, which is optional: through its own command on a merged folder, and through `lolcats eval --tasks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.evaluation import lm_eval_tasks as harness
from lolcats_cli.main import run

QUESTIONS = [
    {"question": f"{who} saw", "choices": [" a whale", " two men sang"], "answer": number % 2}
    for number, who in enumerate(("the ship", "the men", "one whale", "home", "the sea", "white sail"))
]
TASK = """
task: ships
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "ships.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "ships.yaml").write_text(TASK.format(data=folder / "ships.jsonl"))
    return folder / "ships.yaml"


@torch.no_grad()
def accuracy(folder: Path) -> float:
    """By hand: how often the right choice has the higher log-likelihood."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            new = len(tokenizer(choice)["input_ids"])
            nats = model(ids).logits[0, -new - 1 : -1].log_softmax(-1)
            scores.append(nats.gather(1, ids[0, -new:, None]).sum().item())
        right += scores.index(max(scores)) == row["answer"]
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_lm_eval_runs_a_merged_folder_offline(pipeline: SimpleNamespace, task: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    arguments = ["--model", "hf", "--model_args", f"pretrained={pipeline.student},trust_remote_code=True"]
    arguments += ["--tasks", str(task), "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = "import sys\nfor name in ('lolcats_cli', 'lolcats_kernels'): sys.modules[name] = None\n"
    start += "import runpy; runpy.run_module('lm_eval', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["ships"]["acc,none"] == pytest.approx(accuracy(pipeline.student))


@pytest.mark.slow
def test_lolcats_eval_gives_the_same(pipeline: SimpleNamespace, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert run(["eval", str(pipeline.student), "--tasks", str(task), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["results"]["ships"]
    assert (figures["acc"], figures["shots"]) == (pytest.approx(accuracy(pipeline.student)), 0)
    with pytest.raises(UsageError, match="no-such-task is neither a task of lm_eval"):
        harness.load_tasks(["no-such-task"])
    with pytest.raises(BadInput, match="data of the task piqa cannot be read from the Hugging Face hub"):
        harness.load_tasks(["paper"])


def test_figures_as_a_table() -> None:
    from lolcats_cli.commands.eval import task_table

    figures = {"shots": 0, "acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "acc_norm_stderr": 0.05}
    assert task_table({"ships": figures, "mmlu": {"shots": 5, "acc": 1.0}}).splitlines() == [
        "       shots            acc      acc_norm",
        "ships      0  50.0% ± 10.0%  25.0% ± 5.0%",
        "mmlu       5         100.0%             -",
    ]


def test_without_lm_eval_the_extra_is_named(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert run(["eval", str(pipeline.student), "--tasks", "paper"]) == 2
    assert "pip install 'lolcats[eval]'" in capsys.readouterr().err
    assert run(["eval", str(pipeline.student)]) == 2
    assert "Give --data, or --tasks." in capsys.readouterr().err
