"""docs/serve.md: its commands run against a server as the guide starts it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import train_models
from forks import environment
from guides import DOCS, blocks
from servers import Server


def test_the_guides_commands_work(tmp_path: Path):
    shown = [block.body for block in blocks(DOCS / "serve.md") if block.language == "sh"]
    (start,) = (
        line for body in shown for line in body.splitlines() if line.startswith("parallama serve")
    )
    words = shlex.split(start)[3:]  # but for the model
    del words[words.index("--port") :]
    model = train_models.make(tmp_path / "model", heads=4, kv_heads=2, hidden=32)
    server = Server(model, *words, log=tmp_path / "log")
    try:
        asking = [body for body in shown if "127.0.0.1:8000" in body]
        assert len(asking) == 3
        for body in asking:
            text = body.replace("http://127.0.0.1:8000", server.url)
            run = subprocess.run(
                ["bash", "-c", text.replace("python -", f"{sys.executable} -")],
                capture_output=True,
                text=True,
                timeout=60,
                env=environment(),
            )
            assert run.returncode == 0 and run.stdout, run.stderr
        assert server.stop() == 0
    finally:
        server.child.kill()
