"""The scripts in benchmarks/, with a tiny CLIP: they run, and their tables say what was measured.

Tests of the authors' code need checkouts: PEER_CHECKOUTS=FOLDER, with a folder per repository as git clone names it.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines import REPOSITORY

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.errors import UserError

BENCHMARKS = REPOSITORY / "benchmarks"
MODULES = ("common", "official_peers", "single_process")
SCRIPTS = sorted(file.name for file in BENCHMARKS.glob("*.py") if file.stem not in MODULES)
PEERS = {
    "MaPLe": r"prompt_learner\.(ctx|proj\.\w+|compound_prompts_text\.\d|compound_prompt_projections\.\d\.\w+)",
    "CoOp": r"prompt_learner\.ctx",
    "PromptSRC": r"prompt_learner\.ctx|image_encoder\.VPT|(image|text)_encoder\.transformer\.resblocks\.1\.VPT_shallow",
    "CLIP-LoRA": r"(visual\.)?transformer\.resblocks\.[01]\.attn\.[qkv]_proj\.w_lora_[AB]",
}
"""Peer → names of the parameters that its authors train."""


def write_model(file: Path, vision_width: int, text_width: int) -> None:
    vision = {"image_size": 32, "patch_size": 16, "layers": 2, "width": vision_width}
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": text_width // 64, "layers": 2}
    file.write_text(json.dumps({"embed_dim": text_width, "vision_cfg": vision, "text_cfg": text}))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Makes the benchmarks' modules importable, with results in `tmp_path` and two tiny models."""
    ensure_torchvision()
    import open_clip

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for name, widths in {"tiny": (64, 64), "tiny-ViT-B": (768, 512)}.items():
        write_model(tmp_path / f"{name}.json", *widths)
        open_clip.add_model_config(tmp_path / f"{name}.json")


def run_script(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}_cpu.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, modules, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, script, "--help")
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


def test_the_step_time_has_all_precisions(modules, monkeypatch, tmp_path, capsys):
    run_script(monkeypatch, "step_time.py", "--model", "tiny", "--cases", "1x2x3", "2x1x3", "--repeats", 1)
    rows = result(tmp_path, "step_time_tiny")["rows"]
    assert [(row["case"], row["precision"]) for row in rows] == [
        (case, precision) for case in ("1x2x3", "2x1x3") for precision in ("float32", "bfloat16")
    ]
    assert all(set(row["seconds"]) == set(row["gflop"]) == {"ours", "plain"} for row in rows)
    assert all(row["difference"] < (1e-4 if row["precision"] == "float32" else 0.1) for row in rows)
    assert "plain / ours" in capsys.readouterr().out


def test_the_aggregations_are_timed_beside_the_sum(modules, monkeypatch, tmp_path, capsys):
    run_script(monkeypatch, "aggregation.py", "--model", "tiny", "--cases", "2x2x3", "3x1x3", "--repeats", 1)
    for row in result(tmp_path, "aggregation_tiny")["rows"]:
        assert row["seconds"].keys() == {"sum", *row["added"], "passes"} and len(row["added"]) == 7
        assert all(0 < row["added"][name] < row["seconds"][name] for name in row["added"])
    assert "| 3 x 1 x 3 | upgrad |" in capsys.readouterr().out


def test_the_step_memory(modules, monkeypatch, tmp_path):
    run_script(monkeypatch, "step_time.py", "--model", "tiny", "--cases", "1x2x3", "--memory", "--precision", "float32")
    (row,) = result(tmp_path, "step_memory_tiny")["rows"]
    assert set(row["gib"]) == {"ours", "plain"}


def test_the_best_precision_of_each_side_is_compared(modules):
    import step_time

    row = {"case": "1x4x65", "gflop": {"ours": 1, "other": 3}}
    rows = [
        {**row, "precision": "float32", "seconds": {"ours": 2.0, "other": 3.0}},
        {**row, "precision": "bfloat16", "seconds": {"ours": 1.0, "other": 4.0}},
    ]
    assert "| 1 x 4 x 65 | 1.000 (bfloat16) | **3.0** (float32) |" in "\n".join(step_time.time_tables(rows))


def test_the_median_counts(modules, monkeypatch):
    import common

    seconds = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])
    monkeypatch.setattr(common, "time_call", lambda step, device: next(seconds))
    assert common.median_seconds({"a": None, "b": None}, 3, torch.device("cpu")) == {"a": 2.0, "b": 20.0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_growth(precision, modules, monkeypatch, tmp_path):
    options = ("--model", "tiny", "--cases", "1x2x3", "--precision", precision, "--repeats", 1)
    run_script(monkeypatch, "growth.py", *options)
    assert len(result(tmp_path, f"growth_tiny_{precision}")["rows"]) == 1


def test_utilization(modules, monkeypatch, tmp_path):
    import utilization

    monkeypatch.setattr(utilization, "matmul_tflops", lambda device, precision: 1.0)  # seconds where it is slow
    options = ("--model", "tiny", "--images", 4, "--evaluated", 2, "--classes", 3, "--repeats", 1)
    monkeypatch.setattr(sys, "argv", ["utilization.py", *map(str, options)])
    utilization.main()
    rows = result(tmp_path, "utilization_tiny")["rows"]
    assert [(row["what"], row["precision"]) for row in rows] == [
        (call, precision) for precision in ("float32", "bfloat16") for call in ("training", "evaluation")
    ]
    assert rows[0]["difference"] == 0 < rows[2]["difference"] < 0.1


WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = sys.modules["mlflow"] = None
sys.path[:0] = [{benchmarks!r}]
import common, open_clip, pathlib, utilization
utilization.matmul_tflops = lambda device, precision: 1.0  # seconds where it is slow
common.RESULTS = pathlib.Path({folder!r})
open_clip.add_model_config(common.RESULTS / "tiny.json")
sys.argv[0] = {benchmarks!r} + "/gpu.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_gpu(folder: Path, *arguments: object) -> tuple[str, dict]:
    """Run gpu.py in a process that cannot import Ray and MLflow, and return its output and results."""
    write_model(folder / "tiny.json", 64, 64)
    code = WITHOUT_RAY.format(benchmarks=str(BENCHMARKS), folder=str(folder))
    options = ["--device", "cpu", "--model", "tiny", "--repeats", "1", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *options]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, result(folder, "gpu_tiny")


def test_the_gpu_script_runs_without_ray_and_mlflow(tmp_path):
    sizes = ("--cases", "1x2x3", "--classes", 3, "--images", 4, "--evaluated", 2, "--epochs", 1)
    output, values = run_gpu(tmp_path, "--parts", "step_time", "utilization", "pipeline", *sizes)
    assert not values["left_out"]
    assert values["step_time"] and values["utilization"]
    assert list(values["pipeline"]["seconds"])[-1] == "evaluation"
    assert "| evaluation |" in output


def test_the_gpu_script_lists_what_it_had_no_time_for(modules, monkeypatch, tmp_path, capsys):
    import utilization

    monkeypatch.setattr(utilization, "matmul_tflops", lambda device, precision: 1.0)
    run_script(monkeypatch, "gpu.py", "--device", "cpu", "--model", "tiny", "--minutes", 0)
    output, values = capsys.readouterr().out, result(tmp_path, "gpu_tiny")
    names = ("step time 1x16x65", "utilization float32", "pipeline: grouping", "training as CUDA graph")
    for name in names:
        assert any(text.startswith(name) for text in values["left_out"]), (name, values["left_out"])
        assert f"- {name}" in output
    assert not values["step_time"]


@pytest.mark.parametrize("peer", PEERS)
def test_a_folder_without_the_authors_code_is_refused(peer, modules, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}.*git clone https://github.com/"):
        run_script(monkeypatch, "step_time.py", f"--{peer.lower()}", tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_train_the_authors_parameters(peer, precision, modules, monkeypatch):
    import common
    import official_peers

    if "PEER_CHECKOUTS" not in os.environ:
        pytest.skip("needs PEER_CHECKOUTS=FOLDER with checkouts of the authors' code")
    for options, keys in (
        (official_peers.MAPLE, ["PROMPT_DEPTH"]),
        (official_peers.PROMPTSRC, ["PROMPT_DEPTH_VISION", "PROMPT_DEPTH_TEXT"]),
    ):
        for key in keys:
            monkeypatch.setitem(options, key, 2)
    source = official_peers.SOURCES[peer]
    checkout = Path(os.environ["PEER_CHECKOUTS"]) / source.repository.rpartition("/")[2]
    model, towers = common.load("tiny-ViT-B", torch.device("cpu"))
    built = source.build(checkout, model, ["cat", "tricycle"], precision)
    gradients = built.step(*common.random_batch(towers, 2, 2), num_tasks=2)()
    assert all(re.fullmatch(PEERS[peer], name) for name in built.trained), list(built.trained)
    assert len(gradients) == len(built.trained)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
