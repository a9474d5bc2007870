"""An engine in a process of its own: JSON lines over a socket, one command at a time.

Run as `python -m parallama.bench.worker '{"engine": "hf", ...}'` by `processes`. An engine that has
several processes itself (`hf-tp`) is started by torchrun, and only its first one speaks.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from ..environment import name_kernels
from ..errors import ParallamaError, cause, lines, to_reply
from ..host import peak_rss_bytes
from ..sharded.loading import DTYPES
from .engine import Engine, Ours

VERSIONS = ("parallama", "torch", "torch_xla", "transformers")


def main() -> None:
    """Make the engine that the first argument describes, and do as told until the socket closes."""
    given = json.loads(sys.argv[1])
    cores = sorted(os.sched_getaffinity(0))[: given["threads"]]
    os.sched_setaffinity(0, cores)
    if given.get("profiled"):
        name_kernels()
    try:
        served: Any = _made(given)
    except ParallamaError as error:
        _say(_connect(given), to_reply(error))
        return
    except Exception as error:
        _say(_connect(given), {"error": _reason(error)})
        return
    if given["engine"] == "hf-tp" and served.engine.rank > 0:
        served.engine.follow()
        return
    stream = _connect(given)
    _say(stream, served.started)
    for line in stream:
        command = json.loads(line)
        try:
            reply: dict[str, Any] = getattr(served, command.pop("do"))(**command)
        except Exception as error:  # whatever a peer runs into is why it could not run the case
            reply = {"error": _reason(error)}
        _say(stream, reply | {"peak_rss_bytes": peak_rss_bytes()})
    served.close()
    sys.stderr.flush()
    os._exit(0)  # XLA's threads need not be joined one by one


def _made(given: dict[str, Any]) -> Any:
    if given["engine"] == "machine":
        return Machine(given["threads"])
    if "train" in given:
        from .train_engines import Served as Trained

        return Trained(given, VERSIONS)
    return Served(given)


def _connect(given: dict[str, Any]) -> Any:
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(given["socket"])
    return channel.makefile("rw", encoding="utf-8", newline="\n")


def _say(stream: Any, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, ParallamaError):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {cause(error)}"


class Served:
    """The commands of an engine."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.started: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS}
        }
        self.engine = self._make(given)

    def _make(self, given: dict[str, Any]) -> Engine:
        name, model, devices = given["engine"], given["model"], given["devices"]
        if name == "parallama":
            return self._ours(given)
        from .peers import HF, HFTP, HFCompile
        from .recipe import Recipe, RecipeOpenXLA

        peers: dict[str, Callable[..., Engine]] = {
            "hf": HF,
            "hf-compile": HFCompile,
            "hf-tp": HFTP,
            "recipe": Recipe,
            "recipe-openxla": RecipeOpenXLA,
        }
        return peers[name](model, devices, DTYPES[given["dtype"]], given["threads"])

    def _ours(self, given: dict[str, Any]) -> Ours:
        """Load the model, and take the times of a cold start on the way."""
        import transformers  # noqa: F401 - its time belongs to the imports

        from ..api import load
        from ..engine.interface import start

        start(given["mesh"], backend=given["backend"], backend_options=given["backend_options"])
        imported = time.time()
        ours = Ours(
            load(
                given["model"],
                mesh=given["mesh"],
                backend=given["backend"],
                backend_options=given["backend_options"],
                dtype=given["dtype"],
                allow_nonfinite=given["allow_nonfinite"],
                progress=None,
            )
        )
        loaded = time.time()
        ours.prepare(1, 8, 8)
        ready = time.time()
        prompts = [list(range(1, 9))]
        ours.prefill(prompts)
        answered = time.time()
        warm = min(self._seconds(lambda: ours.prefill(prompts)) for _ in range(3))
        self.started["start"] = {
            "import_s": imported - given["born"],
            "load_s": loaded - imported,
            "load_bytes_read": ours.llm.load_stats.bytes_read,
            "load_baseline_rss_bytes": ours.llm.load_stats.baseline_rss_bytes,
            "load_peak_rss_bytes": ours.llm.load_stats.peak_rss_bytes,
            "trace_s": ours.stats.trace_s,
            "compile_s": ready - loaded - ours.stats.trace_s,
            "first_token_s": answered - ready,
            "cold_ttft_s": answered - given["born"],
            "warm_ttft_s": warm,
            "programs": ours.stats.programs_compiled,
            "param_bytes_per_device": ours.llm.param_bytes_per_device(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return ours

    @staticmethod
    def _seconds(run: Any) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def prepare(self, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        """Get ready for a case."""
        gc.collect()
        return {"seconds": self._seconds(lambda: self.engine.prepare(batch, prompt, steps))}

    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        """One prefill, timed."""
        began = time.perf_counter()
        tokens = self.engine.prefill(prompts)
        return {"seconds": [time.perf_counter() - began], "tokens": [tokens]}

    def decode(self, steps: int) -> dict[str, Any]:
        """Some decode steps, each timed."""
        stats = self.engine.stats if isinstance(self.engine, Ours) else None
        host_s, done = (0.0, 0) if stats is None else (stats.decode_host_s, stats.decode_steps)
        seconds, tokens = [], []
        for _ in range(steps):
            began = time.perf_counter()
            tokens.append(self.engine.decode())
            seconds.append(time.perf_counter() - began)
        reply: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
        if stats is not None:
            each_s = (stats.decode_host_s - host_s) / (stats.decode_steps - done)
            reply["host_ms_per_step"] = 1e3 * each_s
            reply["programs_after_warmup"] = stats.programs_after_warmup
        return reply

    def close(self) -> None:
        """End what else the engine started."""
        self.engine.close()


class Machine:
    """The machine's limits, measured by torch alone on all threads."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.started: dict[str, Any] = {}
        self._read = torch.ones(256 * 1024 * 1024)
        generator = torch.Generator().manual_seed(0)
        self._a = torch.randn(2048, 2048, generator=generator)
        self._b = torch.randn(2048, 2048, generator=generator)

    def measure(self) -> dict[str, Any]:
        """Bytes a second of reading 1 GiB, and FLOPs a second of a 2048 x 2048 product.

        Of each the best of three.
        """

        def best(run: Any) -> float:
            return min(Served._seconds(run) for _ in range(3))

        return {
            "bandwidth_bytes_per_s": self._read.nbytes / best(self._read.sum),
            "gemm_flops_per_s": 2 * 2048**3 / best(lambda: self._a @ self._b),
        }

    def close(self) -> None:
        """Nothing else runs."""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(
            lines("this is started by `parallama bench`", "expected one argument, a JSON object")
        )
    main()
