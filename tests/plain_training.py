"""Fine-tuning as one writes it for a single device, without parallama and without XLA.

    python plain_training.py REQUEST.json

That is transformers, torch's AdamW, its clipping, and transformers' schedule. The request names:
- `model`: a `.gguf` file or a folder;
- `batches`: an `.npz` file of int64 `[N, R, S]`: `ids`, `labels` and `documents` of every optimizer
  step, each as `train.batch` has it;
- `lr`, `betas`, `eps`, `weight_decay`, `max_grad_norm`, `threads`.

On standard output, as JSON: every step's `[loss, gradient norm]`.

Every document is a sequence of its own here, filled up on the right: packing has to be equal to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

IGNORED = -100


def load(path: Path) -> Any:
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def apart(ids: np.ndarray, labels: np.ndarray, documents: np.ndarray) -> dict[str, torch.Tensor]:
    """The documents of `[R, S]` rows, one a row."""
    rows = [
        (ids[row][documents[row] == number], labels[row][documents[row] == number])
        for row in range(ids.shape[0])
        for number in range(documents[row].max() + 1)
    ]
    longest = max(len(own) for own, _ in rows)
    made = {
        name: torch.full((len(rows), longest), fill)
        for name, fill in (("ids", 0), ("labels", IGNORED), ("mask", 0))
    }
    for at, (own, wanted) in enumerate(rows):
        made["ids"][at, : len(own)] = torch.from_numpy(own)
        made["labels"][at, : len(own)] = torch.from_numpy(wanted)
        made["mask"][at, : len(own)] = 1
    return made


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    batches = np.load(request["batches"])
    model = load(Path(request["model"])).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": request["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=request["lr"], betas=request["betas"], eps=request["eps"]
    )
    steps = len(batches["ids"])
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=0, num_training_steps=steps
    )
    found = []
    for step in range(steps):
        rows = apart(*(batches[name][step] for name in ("ids", "labels", "documents")))
        optimizer.zero_grad()
        logits = model(input_ids=rows["ids"], attention_mask=rows["mask"], use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), request["max_grad_norm"])
        optimizer.step()
        schedule.step()
        found.append([float(loss.detach()), float(norm)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
