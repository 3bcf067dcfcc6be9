"""docs/tutorial.md, run from its first command to its last."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import PATIENCE_S, REPOSITORY
from servers import Server, free_ports

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)(?: (server) (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED_AS = re.compile(r"Save this as `(.+)`:\n\n$")
KEEP_RUN = '[ -z "${RUN:-}" ] || declare -p RUN > .state'


def blocks() -> list[tuple[int, re.Match]]:
    """(line, block) of all code in the tutorial."""
    text = TUTORIAL.read_text()
    return [(text.count("\n", 0, block.start()) + 1, block) for block in BLOCK.finditer(text)]


def test_all_code_of_the_tutorial_is_known_to_this_test():
    text = TUTORIAL.read_text()
    assert text.count("```") == 2 * len(blocks()) and len(blocks()) > 10
    assert {block[1] for _, block in blocks()} == {"sh", "yaml"}


@pytest.mark.fault_injection
def test_every_command_of_the_tutorial_works(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    ports = dict(zip(("5000", "8000"), map(str, free_ports(2, first=5300))))
    outputs: list[str] = []
    server: Server | None = None
    try:
        for line, block in blocks():
            kind, is_server, ready, code = block.groups()
            for written, free in ports.items():
                code = re.sub(rf"\b{written}\b", free, code)
                ready = ready and ready.replace(written, free)
            if kind == "yaml":
                code, found = re.subn(r"epochs: 20\b", "epochs: 4", code)  # of the commands' work, not the reader's
                assert found == 1
                name = SAVED_AS.search(block.string[: block.start()])
                (tmp_path / name[1]).write_text(code)
            elif is_server:
                if server:
                    server.kill()
                command = ["bash", "-ec", f"[ ! -f .state ] || . ./.state\n{code}"]
                server = Server(command, tmp_path / f"server-{line}.log", environment, ready)
            else:
                script = f"[ ! -f .state ] || . ./.state\n{code}\n{KEEP_RUN}\n"
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", script],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE_S,
                )
                assert done.returncode == 0, f"{TUTORIAL.name}:{line}\n{done.stdout}\n{done.stderr}"
                outputs.append(done.stdout)
    finally:
        if server:
            server.kill()
    told = "\n".join(outputs)
    assert "MmAP, grouped" in told and "photos/ink/three/0000.png,three," in told
    assert "outline added" in told and "models:/photos/1" in told
    served = [json.loads(line) for line in re.findall(r"^\{.*?\}$", outputs[-1].replace("}{", "}\n{"), re.MULTILINE)]
    assert "outline" in json.dumps(served[0]) and "two" in json.dumps(served[1]) and "five" in json.dumps(served[2])
    assert Path(tmp_path / "predictions.parquet").is_dir()
