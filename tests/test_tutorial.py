"""docs/tutorial.md, executed from start to end."""

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
# `<!-- server: URL -->` before a block: it runs until the end, and answers at the URL.
BLOCK = re.compile(r"^(?:<!-- server: (\S+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED_AS = re.compile(r"Save this as `(.+)`:\n\n$")
KEEP_RUN = '[ -z "${RUN:-}" ] || declare -p RUN > .state'


def blocks() -> list[tuple[int, re.Match]]:
    """Return (line, block) of all code in the tutorial."""
    text = TUTORIAL.read_text()
    return [(text.count("\n", 0, block.start()) + 1, block) for block in BLOCK.finditer(text)]


def test_all_code_of_the_tutorial_is_known_to_this_test():
    text = TUTORIAL.read_text()
    assert text.count("```") == 2 * len(blocks()) and len(blocks()) > 10
    assert {block[2] for _, block in blocks()} == {"sh", "yaml"}


@pytest.mark.fault_injection
def test_every_command_of_the_tutorial_works(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ports = dict(zip(("5000", "8000"), map(str, free_ports(2, start=5300))))
    outputs: list[str] = []
    server: Server | None = None
    try:
        for line, block in blocks():
            ready_url, kind, code = block.groups()
            for port, free_port in ports.items():
                code = re.sub(rf"\b{port}\b", free_port, code)
                ready_url = ready_url and ready_url.replace(port, free_port)
            if kind == "yaml":
                code, num_replaced = re.subn(r"epochs: 20\b", "epochs: 4", code)  # for speed
                assert num_replaced == 1
                name = SAVED_AS.search(block.string[: block.start()])
                (tmp_path / name[1]).write_text(code)
            elif ready_url:
                if server:
                    server.kill()
                command = ["bash", "-ec", f"[ ! -f .state ] || . ./.state\n{code}"]
                server = Server(command, tmp_path / f"server-{line}.log", environment, ready_url)
            else:
                script = f"[ ! -f .state ] || . ./.state\n{code}\n{KEEP_RUN}\n"
                process = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", script],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE_S,
                )
                assert process.returncode == 0, f"{TUTORIAL.name}:{line}\n{process.stdout}\n{process.stderr}"
                outputs.append(process.stdout)
                if len(outputs) == 1:  # it has written the images: for speed, few are for testing
                    for image in tmp_path.glob("*/*/test/*/*.png"):
                        if int(image.stem) >= 12:
                            image.unlink()
    finally:
        if server:
            server.kill()
    output = "\n".join(outputs)
    assert "MmAP, grouped" in output and "photos/ink_left/test/three/0000.png,ink_left,three," in output
    assert "thick_right added" in output and "models:/photos/1" in output
    documents = re.findall(r"^\{.*?\}$", outputs[-1].replace("}{", "}\n{"), re.MULTILINE)
    responses = [json.dumps(json.loads(document)) for document in documents]
    assert "thick_right" in responses[0] and "two" in responses[1] and "five" in responses[2]
    assert Path(tmp_path / "predictions.parquet").is_dir()
