"""lm-evaluation-harness's own `hf` model on SmolLM2's weights, in fp32 on the host, without XLA.

`python eval_reference.py OPTIONS.json` prints what it finds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from parallama.files.find import find
from parallama.model.spec import ModelSpec


def model() -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    from transformers import LlamaForCausalLM

    checkpoint = find("smollm2")
    made = LlamaForCausalLM(checkpoint.config).eval()
    missing, unexpected = made.load_state_dict(
        dict(checkpoint.tensors(ModelSpec.from_config(checkpoint.config))), strict=False
    )
    assert missing == ["lm_head.weight"] and not unexpected
    made.tie_weights()
    return made, checkpoint.tokenizer()


def main() -> None:
    asked = json.loads(sys.argv[1])
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    net, tokenizer = model()
    lm = HFLM(
        pretrained=net,
        tokenizer=tokenizer,
        device="cpu",
        dtype="float32",
        batch_size=asked.pop("batch_size", 4),
        max_length=asked.pop("max_length"),
    )
    runs = []
    for run in asked.pop("runs"):
        manager = TaskManager(include_path="eval_tasks", include_defaults=False)
        found = simple_evaluate(
            model=lm, task_manager=manager, bootstrap_iters=0, log_samples=True, **run
        )
        runs.append(summary(found))
    print("\n" + json.dumps(runs))


def summary(document: Any) -> dict[str, Any]:
    """Metrics by task, and what each request of each document got."""
    rows = {
        task: [
            [answer for answers in sample["resps"] for answer in answers]
            for sample in sorted(samples, key=lambda row: row["doc_id"])
        ]
        for task, samples in document["samples"].items()
    }
    return {
        "results": document["results"],
        "answers": rows,
        "prompts": {
            task: [row["arguments"] for row in samples]
            for task, samples in document["samples"].items()
        },
    }


if __name__ == "__main__":
    main()
