"""What other programs call an option or command of ours, and what they have that we don't. Pure.

Their names are those of vLLM, llama.cpp, mlx-lm, litgpt, transformers, TRL and ollama.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

_SAME: Mapping[str, str] = {
    "--model": (
        "-m model-path model-name model-id model-name-or-path pretrained repo hf-repo checkpoint"
        " ckpt checkpoint-dir ckpt-dir model-dir model-tag"
    ),
    "--max-new-tokens": (
        "max-tokens max-token max-length max-completion-tokens n-predict num-predict predict"
        " num-tokens new-tokens max-gen-len max-output-tokens gen-len -n"
    ),
    "--max-model-len": (
        "max-seq-len max-seq-length max-sequence-length max-context max-context-len ctx-size"
        " context-length context-size context num-ctx n-ctx ctx max-kv-size -c"
    ),
    "--temperature": "temp -t greedy do-sample sampling-temperature",
    "--top-k": "topk",
    "--top-p": "topp nucleus",
    "--min-p": "minp",
    "--repetition-penalty": "repeat-penalty rep-pen rep-penalty",
    "--seed": "random-seed rng-seed sampling-seed",
    "--system": "system-prompt sys system-message sys-prompt",
    "--system-instruction": "system-prompt sys system system-message",
    "--prompt": "text input inputs query question message",
    "--prompt-file": "file input-file -f",
    "--prompts-file": "prompts input-jsonl",
    "--prompt-ids": "token-ids prompt-token-ids input-ids tokens",
    "--chat": "chat-template use-chat-template apply-chat-template instruct conversation cnv",
    "--apply-chat-template": "chat chat-template use-chat-template",
    "--stop": "stop-sequence stop-sequences stop-strings stop-words reverse-prompt extra-eos-token",
    "--ignore-eos": "no-eos ignore-eos-token",
    "--n": "num-return-sequences num-samples best-of n-completions num-generations",
    "--tensor-parallel-size": (
        "tp tp-size tensor-parallel tensor-parallelism tensor-model-parallel-size"
        " num-gpus gpus n-gpus num-devices ngpu nproc-per-node chips num-chips world-size"
    ),
    "--mesh": (
        "dp dp-size data-parallel-size data-parallel mesh-shape parallelism topology"
        " tensor-split split-mode"
    ),
    "--devices": "num-devices n-devices device-count",
    "--backend": "device platform accelerator runtime pjrt-device",
    "--dtype": "precision torch-dtype data-type weight-dtype compute-dtype bf16 fp16 half bfloat16",
    "--plan": "sharding sharding-plan tp-plan shard-config",
    "--batch": "batch-size bs -b per-device-train-batch-size micro-batch-size rows",
    "--batch-size": "batch bs per-device-eval-batch-size",
    "--seq": "seq-len seqlen seq-length sequence-length prompt-len prompt-length input-len isl",
    "--prompt-tokens": "prompt-len input-len isl seq seq-len",
    "--hardware": "gpu device accelerator chip gpu-type machine memory hbm vram gpu-memory",
    "--train": "training finetune fine-tune",
    "--grad-accum": "gradient-accumulation-steps grad-accumulation accumulate-grad-batches",
    "--remat": (
        "gradient-checkpointing activation-checkpointing recompute grad-checkpoint"
        " activation-checkpoint checkpointing"
    ),
    "--fsdp": "zero zero-stage zero3 shard-data",
    "--lora.rank": "lora-rank lora-r rank lora use-lora",
    "--lora.targets": "lora-targets target-modules lora-target-modules targets",
    "--optimizer": "optim",
    "--json": "format output-format as-json",
    "--quiet": "silent -q no-progress disable-progress",
    "--debug": "verbose -v -vv traceback log-level",
    "--allow-nonfinite": "allow-nan allow-inf skip-nan-check",
    "--tasks": "task benchmark benchmarks",
    "--num-fewshot": "few-shot fewshot shots n-shot",
    "--limit": "max-samples num-samples timeout",
    "--output-path": "output out -o output-dir results",
    "--decode": "new-tokens max-new-tokens decode-tokens",
    "--grads": "gradients backward",
    "--plot": "picture draw svg png chart graph",
    "--gpu-memory-utilization": "mem-fraction-static kv-cache-memory memory-utilization",
    "--backend-option": "plugin-option client-option",
}
"""An option of ours -> what others call it, without the dashes."""
_ANSWERS: Mapping[str, str] = {
    "trust-remote-code": "it is not needed: no code that comes with a model is ever run",
    "gpu-memory-utilization mem-fraction-static kv-cache-memory": (
        "it is an option of 'parallama serve'; elsewhere a cache is as long as its texts, "
        "or as --max-model-len says"
    ),
    "quantization load-in-8bit load-in-4bit quantize kv-cache-dtype bits": (
        "quantized weights are not supported; --dtype bfloat16 takes half of float32"
    ),
    "load-format": "the form is seen: a folder of safetensors, or a .gguf file",
    "hf-token token hf-hub-token": "sign in with 'hf auth login', or set HF_TOKEN",
    "revision hf-revision": (
        "the main one is taken; of others: hf download ORG/NAME --revision R --local-dir FOLDER"
    ),
    "cache-dir download-dir": "set HF_HOME for the hub's cache",
    "num-beams beam-size beam-search use-beam-search": "beam search is not supported: sampling is",
    "pp pipeline-parallel-size pipeline-parallel pp-size": (
        "there is no pipeline parallelism: --mesh has the axes data and model"
    ),
    "ep expert-parallel-size enable-expert-parallel cp context-parallel-size": (
        "--mesh has the axes data and model, and no other"
    ),
    "stream streaming no-stream": "a single prompt streams by itself, several come at their end",
    "tokenizer tokenizer-mode": "the model's own tokenizer is taken: put it into its folder",
    "n-gpu-layers ngl -ngl gpu-layers num-gpu-layers": "all layers are put on the devices",
    "threads -t num-threads": "XLA takes the cores that it may use: taskset limits them",
    "enforce-eager eager compile torch-compile": "every step is compiled, once",
    "host port served-model-name api-key": "that is an option of 'parallama serve'",
    "attn-implementation flash-attn attention-backend use-flash-attention": (
        "there is one attention, and it is chosen"
    ),
    "output -o out output-dir save-dir": "the folder to write is an argument behind MODEL",
    "data dataset epochs learning-rate lr steps": "that is a key of 'parallama train'",
    "prompt": "'parallama generate' takes a prompt; here, type it",
}
"""What others have -> why there is no such option, or what to do instead."""
_COMMANDS: Mapping[str, str] = {
    "generate": "run complete completion infer inference predict sample text prompt gen llm",
    "serve": "server api api-server openai-server http start up",
    "chat": "talk converse interactive repl conversation",
    "train": "finetune fine-tune sft tune lora fit pretrain",
    "eval": "evaluate lm-eval lm_eval test-model harness score",
    "export": "convert save merge fuse push convert-to-hf",
    "bench": "benchmark perf speed measure throughput latency",
    "plan": "estimate size memory fit fits shard dry-run estimate-memory forecast",
    "doctor": "env info check diagnose collect-env collect_env devices version selftest",
    "verify": "checksum validate-files check-model lint",
    "validate": "parity compare verify-parity",
    "inspect": "show where layout",
}
"""A command of ours -> what others call it."""


def meant_option(given: str, offered: Collection[str]) -> str:
    """What someone meant by an option that there is not, or why there is none; nothing if unknown.

    Args:
        given: as it was given, with or without a value.
        offered: the options of the command.
    """
    name = _plain(given)
    found = [ours for ours, theirs in _SAME.items() if ours in offered and name in theirs.split()]
    if found:
        return f"did you mean {found[0]}?"
    return next((said for theirs, said in _ANSWERS.items() if name in theirs.split()), "")


def meant_command(given: str, arguments: Sequence[str]) -> str:
    """What someone meant by a command that there is not, or nothing.

    Args:
        arguments: the whole command line.
    """
    found = [ours for ours, theirs in _COMMANDS.items() if given.lower() in theirs.split()]
    if found:
        return f"did you mean {found[0]}?"
    if re.search(r"[/.\d]", given):  # a folder, a hub id, a name such as smollm2
        return f"a model stands behind a command: parallama generate {' '.join(arguments)}"
    return ""


def _plain(option: str) -> str:
    """`--Max_Tokens=5` as `max-tokens`; a short option keeps its dash."""
    name = option.partition("=")[0].lower().replace("_", "-")
    return name.lstrip("-") if name.startswith("--") else name
