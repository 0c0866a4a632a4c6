"""vLLM in a process of its own, as `test_vllm.py` asks for it: python engine.py REQUEST.json RESULT.json

REQUEST is a list of jobs {"folder", "options": of vllm.LLM, "runs"}. A run is {"prompts": token ids, "max_tokens",
"abort": which requests are aborted after some steps, "reset": after how many steps all running requests are preempted}.
RESULT has for each job {"tokens": by run and request, null if it was aborted; "counters": what vLLM counted}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS_BEFORE_ABORT = 4


def serve(engine: Any, run: dict[str, Any], name: str) -> list[list[int] | None]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=run["max_tokens"], temperature=0, ignore_eos=True)
    ids = [f"{name}-{number}" for number in range(len(run["prompts"]))]
    for request, prompt in zip(ids, run["prompts"], strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, params)
    aborted = [ids[number] for number in run.get("abort", ())]
    found: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == STEPS_BEFORE_ABORT and aborted:
            engine.abort_request(aborted)
        if steps == run.get("reset"):
            assert engine.reset_prefix_cache(reset_running_requests=True)
    return [None if request in aborted else found[request] for request in ids]


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        llm = LLM(job["folder"], seed=0, disable_log_stats=False, **job["options"])
        tokens = [serve(llm.llm_engine, run, str(number)) for number, run in enumerate(job["runs"])]
        counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        results.append({"tokens": tokens, "counters": counters})
        del llm
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
