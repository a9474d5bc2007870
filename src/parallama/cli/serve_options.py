"""Groups of options of `parallama serve`: where it listens, what it queues, what it may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..plan.program_shapes import MAX_NUM_SEQS, SLOT_CHUNKS
from . import options

if TYPE_CHECKING:
    from ..plan.slot_fit import Room


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and who may ask."""

    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option("--port", help="0 finds a free one.", callback=options.within(0, 65535)),
    ] = 8000
    uds: Annotated[
        Path | None, typer.Option("--uds", help="Unix domain socket, in place of host and port.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", help="Key to ask for; several times. PARALLAMA_API_KEY hides better."
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with a key a line.")
    ] = None
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines ask without a key.")
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Another name in the Host header; several times."),
    ] = None
    root_path: Annotated[
        str, typer.Option("--root-path", help="Path before ours that a proxy takes off.")
    ] = ""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """How many requests run, and wait."""

    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs", help="Most requests at a time.", callback=options.within(1, 1024)
        ),
    ] = MAX_NUM_SEQS
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            "--max-num-batched-tokens",
            help="Tokens of a prompt between two steps of the others.",
            callback=options.within(1),
        ),
    ] = SLOT_CHUNKS[-1]
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            "--max-num-queued-reqs",
            help="Most requests that wait; more are answered with 429.",
            callback=options.within(1),
        ),
    ] = 128
    max_num_queued_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-num-queued-tokens",
            help="Most prompt tokens that wait.",
            callback=options.within(1),
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Use what is cached for requests that begin the same.",
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How much memory weights and cache may take."""

    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help="Most tokens of prompt and answer together.",
            show_default="what fits, up to the model's",
            callback=options.within(1),
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            "--gpu-memory-utilization",
            help="Share of a device's memory to take; on the CPU, of what the machine has left.",
            callback=options.within(0.01, 1),
        ),
    ] = 0.9
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware", help="Whose memory that is: tpu-v5e, n300, 24GB, as for parallama plan."
        ),
    ] = None

    def room(self, backend: str) -> Room | None:
        """What weights and cache may take together; None where that isn't known."""
        from ..host import available_bytes
        from ..plan.hardware_names import find_hardware
        from ..plan.slot_fit import Room

        share = self.gpu_memory_utilization
        if self.hardware is not None:
            device = find_hardware(self.hardware)
            return Room(name=f"each {device.name}", bytes=int(device.memory_bytes * share))
        left = available_bytes() if backend == "cpu" else None
        if left is None:
            return None
        return Room(name="this machine's memory", bytes=int(left * share), shared=True)
