"""What every command prints with `--json`. `python tests/json_documents.py` writes docs/json.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from json_reference import ROOT, Classes, Document, Key, flat, key, mesh, table

PAGE = ROOT / "docs" / "json.md"
HEAD = """# JSON

Every command but `chat` takes `--json`. Standard output is then one JSON document and nothing
else; progress and figures for people go to standard error, and `--quiet` leaves them out.

Names end with the unit: `_s` seconds, `_bytes`, `_per_s` a second. Times are wall clock.
`[]` stands for every entry of a list. "Object of integers" and the like are objects whose own
keys are data. A value that a run does not have is null.

An error, a wrong command line among them, prints `{"error": {"type", "message", "exit_code"}}`
there, and its lines for people on standard error. A command that has printed its document prints
nothing more: a plan that does not fit (`fits`), a model that is not sound (`passed`).

| key | type | meaning |
|---|---|---|
| `error` | object | in place of the document |
| `error.type` | string | `UsageError`, `CheckpointError`, ...; of a fault of ours, Python's name |
| `error.message` | string | at most three lines: what is wrong, what was expected, what to do |
| `error.exit_code` | integer | [its meaning](generate.md#exit-codes) |

<!-- Made by `python tests/json_documents.py` from the result classes. Change those instead. -->
"""
WORDS = {
    "model": "the model, as it was given",
    "backend": "the backend's name",
    "mesh": "data x model, as `1x8`",
    "dtype": "of weights, cache and activations",
    "name": "its name",
    "device": "its number",
    "batch": "rows over all devices",
    "bytes": "its size",
    "seconds": "wall clock",
    "passed": "the verdict",
    "phase": "the step that was audited",
    "findings": "what is not as it should be",
    "command": "the command that was run",
    "date": "the day of the run",
    "threads": "cores that every engine may use",
    "machine": "what the machine can do",
    "versions": "package -> its version",
    "cpu": "the processor's name",
    "cpu_features": "what the processor has that matters for speed",
    "cores": "cores that the process may use",
    "memory_bytes": "memory of the machine",
    "memory_available_bytes": "what of it is free now",
    "repeats": "how often each was measured",
    "peak_rss_bytes": "most memory that the process has held",
    "param_bytes_per_device": "weights on each device, measured",
    "losses": "of each step, from the first",
    "rows": "what was measured",
    "starts": "the cold start on each mesh",
    "meshes": "one for each mesh",
    "readings": "one for each way to read the files",
    "peers": "the others, in turns with ours",
    "peer": "its name, as for `--peers`",
    "processes": "how many it ran in",
    "profile": "where the time goes, with `--profile`",
    "programs": "programs that were compiled",
    "seq_len": "tokens of a sequence",
    "backends": "every backend that is known",
    "library": "the plugin's file",
    "pjrt_api": "the PJRT API version that the plugin speaks",
    "partitioner": "`gspmd` or `shardy`",
    "version": "null if it is not installed",
    "fits": "the installed version is one of these",
    "what": "what was measured",
    "reader": "`parallama`, `safetensors` (mapped) or `safetensors-pread`",
    "min": "of the slowest",
    "max": "of the fastest",
    "median": "of all",
    "tokens_per_s": "of all rows together",
    "prefill_tokens": "tokens that were taken in at once",
    "decode_tokens": "tokens that were fed one by one",
    "module_tokens": "tokens that modules were compared on",
    "tolerances": "what rounding alone may do",
    "modules": "every module, in order",
    "model_type": "of config.json; null where it cannot be read",
    "folder": "the folder that was written",
    "self_test": "what the self-test found",
    "bytes_per_device": "of `params` and of `optimizer`",
    "plan.DeviceCount.devices": "device count along `model`",
    "prove.SelfTest.devices": "the plugin's names for them",
    "prove.Report.faults": "known faults that apply here",
    "prove.Report.versions": "Python and the packages that matter",
    "engine.Installed.version": "null if it is not installed",
    "engine.Installed.wanted": "what other packages want of it",
    "prove.Validation.prefill": "our logits against the reference's",
    "prove.Validation.decode": "the same, of tokens fed one by one; null without any",
}
"""What keys mean whose class does not say it."""


class Maker:
    """Makes keys of the package's classes, named `room.Class`."""

    def __init__(self) -> None:
        self._classes = Classes(WORDS)

    def whole(self, name: str, prefix: str = "", without: str = "") -> Iterator[Key]:
        """All fields, but one."""
        for each in self._classes.all_of(self._classes.find(name), prefix):
            own = each.path.removeprefix(prefix)
            if not without or own.partition(".")[0].rstrip("[]") != without:
                yield each

    def some(self, name: str, prefix: str, names: str) -> Iterator[Key]:
        """These fields and properties; `key=field` for one that has another name there."""
        cls = self._classes.find(name)
        for pair in names.split():
            path, _, field = pair.partition("=")
            yield from self._classes.one(cls, field or path, prefix + path)


def ignored() -> Iterator[Key]:
    yield from key("ignored", "list of objects", "what of the checkpoint was not read")
    yield from key("ignored[].name", "string", "a tensor or a file")
    yield from key("ignored[].reason", "string", "why not")


def about_run() -> Iterator[Key]:
    yield from key("model", "string", WORDS["model"])
    yield from key("backend", "string", WORDS["backend"])
    yield from mesh()
    yield from key("dtype", "string", WORDS["dtype"])


def generate(make: Maker) -> Document:
    stats = "inference.RunStats"
    read = "load_bytes_read=bytes_read load_bytes_per_s=bytes_per_s"
    rss = "load_baseline_rss_bytes=baseline_rss_bytes load_peak_rss_bytes=peak_rss_bytes"
    host = "time of a decode step outside of the executable and of waiting for it"
    return Document(
        title="parallama generate",
        about="The texts, and what the run took.",
        keys=flat(
            about_run(),
            key("outputs", "list of objects", "one for each prompt, in their order"),
            key("outputs[].prompt", "string or list of integers", "as it was given"),
            make.some(
                "inference.Completion",
                "outputs[].",
                "text token_ids logprobs top_logprobs prompt_logprobs finish_reason stop_reason"
                " index",
            ),
            ignored(),
            key("stats", "object", "what the run took"),
            key("stats.load_s", "number", "starting the devices and loading the model"),
            make.some("sharded.StreamStats", "stats.", f"{read} {rss} largest_tensor_bytes"),
            make.some(stats, "stats.", "compile_s ttft_s"),
            key("stats.prefill_tokens_per_s", "number", "of all rows together"),
            key("stats.decode_tokens_per_s", "number or null", "of all rows together"),
            key("stats.decode_host_ms_per_step", "number or null", host),
            make.some(stats, "stats.", "programs_compiled programs_after_warmup"),
            key("stats.param_bytes_per_device", "list of integers", "weights, measured"),
            key("stats.kv_bytes_per_device", "list of integers", "the KV cache, measured"),
            key("stats.peak_rss_bytes", "integer", WORDS["peak_rss_bytes"]),
        ),
    )


def plan(make: Maker) -> Document:
    size, placed = "integer", "parameters[]."
    inference = {
        "param": "params",
        "kv": "kv",
        "state": "state",
        "activation": "activations",
        "logits": "logits",
        "total": "total",
    }
    training = {
        "param": "params",
        "gradient": "gradients",
        "optimizer": "optimizer",
        "copy": "copies",
        "activation": "activations",
        "activation_remat": "activations_remat",
        "logits": "logits",
        "working": "working",
    }
    phases = {"prefill": "a prefill", "decode": "a decode step", "train": "an optimizer step"}

    def bytes_of(fields: Mapping[str, str]) -> str:
        return " ".join(f"{name}_bytes_per_device={field}" for name, field in fields.items())

    return Document(
        title="parallama plan",
        about="What a plan takes. Everything is predicted. Bytes are those of one device.",
        keys=flat(
            key("model", "string", WORDS["model"]),
            key("parameter_count", size, "numbers of the whole model"),
            mesh(),
            key("dtype", "string", WORDS["dtype"]),
            key("stored_dtype", "string or null", "of the checkpoint, where its config says it"),
            make.some("plan.Request", "", "batch seq max_model_len"),
            key("prefill_positions", size, "of one prefill; a longer prompt takes several"),
            key("parameters", "list of objects", "every parameter, in the model's order"),
            key(f"{placed}name", "string", "as transformers gives it"),
            key(f"{placed}shape", "list of integers", "over all devices, padding included"),
            key(f"{placed}dtype", "string", "what it is loaded as"),
            key(f"{placed}partition", "list of strings or null", "a mesh axis for each dim"),
            make.some("plan.Placement", placed, "style"),
            key(f"{placed}bytes_per_device", size, "its part on one device"),
            key(f"{placed}reason", "string", "why it is placed so"),
            key("heads", "object", "how heads are laid out"),
            key("heads.query_heads", size, "of the checkpoint"),
            key("heads.kv_heads", size, "of the checkpoint"),
            key("heads.head_dim", size, "numbers of a head"),
            make.some("plan.HeadLayout", "heads.", "kind group"),
            key("heads.laid_out_query_heads", size, "over all devices, zero heads included"),
            key("heads.laid_out_kv_heads", size, "the same, repeated heads included"),
            make.some("plan.HeadLayout", "heads.", "extra_weight_percent extra_score_percent"),
            make.some("plan.HeadLayout", "heads.", "extra_cache_percent"),
            key("heads.reason", "string", "the layout in a sentence"),
            key("totals", "object", "bytes on each device"),
            make.some("plan.Memory", "totals.", bytes_of(inference)),
            key("totals.train", "object or null", "in an optimizer step, with `--train`"),
            key("totals.train.rematerialized_layers", size, "layers that are computed again"),
            make.some("plan.TrainMemory", "totals.train.", bytes_of(training)),
            key("totals.train.total_bytes_per_device", size, "all of it, at the peak"),
            key(
                "totals.train.total_remat_bytes_per_device",
                size,
                "if all layers are computed again",
            ),
            key("collectives", "object", "of a step of each phase"),
            *(
                flat(
                    key(f"collectives.{phase}", "list of objects", what, optional=phase == "train"),
                    make.whole("plan.Collective", f"collectives.{phase}[]."),
                )
                for phase, what in phases.items()
            ),
            key("device_counts", "list of objects", "other device counts along `model`"),
            make.whole("plan.DeviceCount", "device_counts[]."),
            key("hardware", "object or null", "with `--hardware`"),
            key("hardware.name", "string", "the device's name"),
            key("hardware.memory_bytes_per_device", size, "what a device has"),
            key("hardware.needed_bytes_per_device", size, "what the request takes"),
            make.some("plan.Fit", "hardware.", "largest_batch largest_context"),
            make.some("plan.Hardware", "hardware.", "sizing_only flops memory_bytes_per_s"),
            make.some("plan.Hardware", "hardware.", "link_bytes_per_s"),
            key(
                "hardware.smallest_mesh",
                "object or null",
                "with the fewest devices on which the run fits as it is; null if none does",
            ),
            key("hardware.smallest_mesh.data", size, "along the axis `data`"),
            key("hardware.smallest_mesh.model", size, "along the axis `model`"),
            key(
                "hardware.alternatives",
                "list of objects",
                "what brings bytes on this mesh, where the run doesn't fit",
            ),
            make.some("plan.Alternative", "hardware.alternatives[].", "options"),
            make.some(
                "plan.Alternative",
                "hardware.alternatives[].",
                "needed_bytes_per_device=needed_bytes",
            ),
            make.some(
                "plan.Alternative",
                "hardware.alternatives[].",
                "saved_bytes_per_device=saved_bytes fits",
            ),
            key("fits", "boolean or null", "null without `--hardware`"),
        ),
    )


def audit(make: Maker) -> Document:
    return Document(
        title="parallama audit",
        about="One phase. With `--phase all`: `phases`, a list of these, and `passed`.",
        keys=flat(make.whole("prove.Audit"), key("passed", "boolean", "nothing was found")),
    )


def inspect(make: Maker) -> Document:
    held, device = "tensors[].", "devices[]."
    return Document(
        title="parallama inspect",
        about="What the devices hold, measured.",
        keys=flat(
            about_run(),
            key("batch", "integer", "rows of the KV cache"),
            key("cache_positions", "integer", "positions of the KV cache"),
            key("devices", "list of objects", "every device"),
            key(f"{device}id", "integer", "its number"),
            key(f"{device}name", "string", "what the runtime calls it"),
            mesh(f"{device}coordinates", "where it is in the mesh"),
            key(f"{device}param_bytes", "integer", "parameters on it"),
            key(f"{device}kv_bytes", "integer", "KV cache on it"),
            key("tensors", "list of objects", "parameters in the model's order, then the cache"),
            make.some("prove.MeasuredTensor", held, "name shape local_shape bytes_per_device"),
            key(f"{held}partition", "list of strings or null", "a mesh axis for each dim"),
            key(f"{held}as_planned", "boolean", "every device holds what the plan says"),
            key(f"{held}parts", "list of objects", "what each device holds"),
            key(f"{held}parts[].device", "integer", "its number"),
            key(f"{held}parts[].slices", "list of lists of 2 integers", "from, to, for each dim"),
            key("details", "list of objects", "with `--tensor`: its parts", optional=True),
            make.whole("prove.ShardContent", "details[]."),
            key("findings", "list of strings", "what is not as planned; exit code 1 if any"),
            key("hlo", "string or null", "the file that `--hlo` wrote"),
        ),
    )


def validate(make: Maker) -> Document:
    return Document(
        title="parallama validate",
        about="Figures that are not finite are null.",
        keys=flat(
            make.whole("prove.Validation"),
            make.some("prove.Validation", "", "faults"),
            key("passed", "boolean", "everything is within its tolerance"),
            key("tokens_from", "string", "where the text is from"),
        ),
    )


def verify(make: Maker) -> Document:
    return Document(
        title="parallama verify",
        about="",
        keys=flat(
            make.whole("prove.Verification", without="ignored"),
            ignored(),
            key("passed", "boolean", "nothing was found"),
        ),
    )


def doctor(make: Maker) -> Document:
    checks = "self_test.checks"
    return Document(
        title="parallama doctor",
        about="",
        keys=flat(
            key("passed", "boolean", "the self-test's verdict"),
            make.whole("prove.Report", without="self_test"),
            key("versions[].fits", "boolean", "it is installed, and fits all that is wanted"),
            key("self_test", "object", WORDS["self_test"]),
            make.whole("prove.SelfTest", "self_test.", without="checks"),
            key(checks, "list of objects", "what was compared"),
            make.whole("engine.torch_xla.Check", f"{checks}[]."),
            key(f"{checks}[].passed", "boolean", "the error is within what is allowed"),
            key("self_test.passed", "boolean", "every check passed"),
        ),
    )


def export(make: Maker) -> Document:
    return Document(
        title="parallama export",
        about="",
        keys=flat(key("model", "string", WORDS["model"]), make.whole("files.Exported")),
    )


def train(make: Maker) -> Document:
    return Document(
        title="parallama train",
        about="How the run ended. The steps are in the run's log, the next table.",
        keys=flat(make.whole("train.Outcome")),
    )


def log(_make: Maker) -> Document:
    number, size = "number or null", "integer"
    return Document(
        title="The log of a run",
        about="`RUN/log.jsonl` has an object a line, one for each step.",
        keys=flat(
            key("step", size, "number of the optimizer step, from 1"),
            key("loss", number, "mean over the tokens that are trained on; null if no number"),
            key("lr", "number", "learning rate"),
            key("grad_norm", number, "global norm of the gradients, before clipping"),
            key("tokens_per_s", "number", "of the whole step"),
            key("step_time_s", "number", "of the whole step"),
            key("mfu", number, "share of the host's measured matrix product; null on real devices"),
            key("tokens", size, "tokens of the step"),
            key("target_tokens", size, "tokens that were trained on"),
            key("epoch", size, "complete passes over the data"),
            key("bytes_per_device", "list of integers", "weights, optimizer state and the rest"),
            key("skipped", "boolean", "true where the step changed nothing", optional=True),
            key("eval_loss", "number", "of a validation", optional=True),
            key("eval_perplexity", "number", "of a validation", optional=True),
            key("eval_tokens", size, "tokens of the validation", optional=True),
            key("samples", "list of anything", "texts, with `sample_every`", optional=True),
        ),
    )


def report(make: Maker) -> Document:
    return Document(
        title="parallama report",
        about="",
        keys=flat(key("run", "string", "the run's folder"), make.whole("train.Summary")),
    )


def evaluate(_make: Maker) -> Document:
    return Document(
        title="parallama eval",
        about=(
            "The document of lm-evaluation-harness (`results`, `n-samples`, `n-shot`, `configs`, "
            "`config` and more, which it describes), with these keys:"
        ),
        keys=flat(
            about_run(),
            key("batch_size", "integer", "sequences at once, over all devices"),
            key("max_model_len", "integer", "most tokens of a request"),
            key("requests", "integer", "requests that were answered"),
            key("tokens", "integer", "tokens that were run for them"),
            key("cut_requests", "integer", "longer requests, which lost their beginning"),
            key("programs_compiled", "integer", "before the first request"),
            key("programs_after_warmup", "integer", "after it; 0"),
            key("evaluation_s", "number", "without loading the model"),
        ),
        others=True,
    )


def bench(make: Maker) -> Document:
    return Document(
        title="parallama bench",
        about="With `--make`: `folder`, `shape` and `parameters`.",
        keys=flat(
            make.whole("bench.Report"),
            key("rows[].versions", "object of strings", WORDS["versions"]),
            key("rows[].threads", "integer", WORDS["threads"]),
        ),
    )


def bench_train(make: Maker) -> Document:
    return Document(
        title="parallama bench --train", about="", keys=flat(make.whole("bench.TrainReport"))
    )


def bench_load(make: Maker) -> Document:
    return Document(
        title="parallama bench --load", about="", keys=flat(make.whole("bench.LoadReport"))
    )


def bench_serve(_make: Maker) -> Document:
    number, size = "number", "integer"
    latencies = {
        "ttft": "time to the first token",
        "tpot": "time per output token behind the first",
        "itl": "time from a chunk to the next",
        "e2el": "time to the last token",
    }

    spread = {
        f"{name}_{metric}_ms": meaning if name == "mean" else "the same"
        for metric, meaning in latencies.items()
        for name in ("mean", "median", "std", "p50", "p95", "p99")
    }
    lists = {
        "input_lens": "tokens of each prompt",
        "output_lens": "tokens of each answer",
        "ttfts": "seconds to the first token",
        "itls": "lists of seconds from each chunk to the next",
        "latencies": "seconds to the last token",
        "start_times": "seconds after the first request was due",
        "queue_times": "seconds that each waited for its turn",
        "generated_texts": "the answers",
        "errors": "why each failed, or nothing",
    }
    goodput = "requests a second within `--goodput`; null without it"
    ratios = (
        "label -> the keys from `model_id` on, and `ratios`: the first server's figures over its"
    )
    return Document(
        title="parallama bench --serve",
        about="The keys of `vllm bench serve`, and what it has none for. Which latencies and "
        "percentiles there are, options say.",
        keys=flat(
            key("date", "string", "when it ended, as `20261128-071500`"),
            key("command", "string", WORDS["command"]),
            key("endpoint_type", "string", "`openai` or `openai-chat`"),
            key("backend", "string", "the same"),
            key("tokenizer_id", "string", "whose tokenizer made the prompts"),
            key("dataset_name", "string", "as it was given"),
            key("seed", size, "of prompts and arrivals"),
            key("num_prompts", size, "requests"),
            key("request_rate", "number or string", "requests a second, or `inf`"),
            key("burstiness", "number or string", "of the arrivals, or `inf`"),
            key("max_concurrency", "integer or null", "most requests at a time"),
            key("ramp_up_strategy", "string", "`linear` or `exponential`", optional=True),
            key("ramp_up_start_rps", number, "the ramp's first rate", optional=True),
            key("ramp_up_end_rps", number, "its last", optional=True),
            key("machine", "object", "that the client and servers of its own ran on"),
            key("machine.cpu", "string", WORDS["cpu"]),
            key("machine.cores", size, "cores that a server may use"),
            key("label", "string", "`parallama` or the server's address"),
            key("model_id", "string", "what requests called the model"),
            key("duration", number, "seconds from the first request to the last answer"),
            key("completed", size, "requests that succeeded"),
            key("failed", size, "requests that failed"),
            key("failures", "list of objects", "why, the most frequent first"),
            key("failures[].error", "string", "what the server or the connection said"),
            key("failures[].count", size, "requests that failed so"),
            key("total_input_tokens", size, "of the requests that succeeded"),
            key("total_output_tokens", size, "of the requests that succeeded"),
            key("token_counts", "string", "`usage`, as the server counts, or `chunks` with text"),
            key("request_throughput", number, "requests a second"),
            key("request_goodput", "number or null", goodput),
            key("output_throughput", number, "output tokens a second"),
            key("total_token_throughput", number, "input and output tokens a second"),
            key("max_output_tokens_per_s", number, "chunks in the busiest second"),
            key("max_concurrent_requests", size, "requests at a time, at most"),
            key("steady_decoding_requests", size, "requests that decoded at a time, at most"),
            key("steady_decoding_s", number, "how long so many did"),
            key("steady_output_throughput", number, "chunks a second in that time"),
            *(key(name, number, meaning) for name, meaning in spread.items()),
            *(
                key(name, "list", f"{meaning}, with `--save-detailed`", optional=True)
                for name, meaning in lists.items()
            ),
            key("peers", "object of objects", ratios),
        ),
    )


COMMANDS = (generate, plan, audit, inspect, validate, verify, doctor, export, train, log, report)
MAKERS = (*COMMANDS, evaluate, bench, bench_train, bench_load, bench_serve)


def documents() -> dict[str, Document]:
    """All documents, by their titles."""
    make = Maker()
    return {made.title: made for made in (each(make) for each in MAKERS)}


def page() -> str:
    """docs/json.md as it should be."""
    parts = [HEAD]
    for document in documents().values():
        about = f"{textwrap.fill(document.about, 100)}\n\n" if document.about else ""
        parts.append(f"## {document.title}\n\n{about}{table(document)}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
