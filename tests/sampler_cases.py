"""What `test_samplers` runs in a worker."""

from __future__ import annotations

from typing import Any

import parallama
from parallama.inference.sampling_params import SamplingParams


def together(
    folder: str, mesh: str, prompts: list[list[int]], params: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What comes of prompts that run at a time, each with parameters of its own."""
    llm = parallama.load(folder, mesh=mesh, max_model_len=256)
    asked = [SamplingParams(**each) for each in params]
    found = llm.generate(prompts, asked)
    compiled = llm.mesh.compilations()
    again = llm.generate(prompts[::-1], asked[::-1])[::-1]
    assert [each.token_ids for each in again] == [each.token_ids for each in found]
    assert llm.mesh.compilations() == compiled
    return [
        {
            "tokens": each.token_ids,
            "text": each.text,
            "logprobs": each.logprobs,
            "tops": each.top_logprobs,
            "prompt": each.prompt_logprobs,
            "ends": (each.finish_reason, each.stop_reason),
        }
        for each in found
    ]
