"""Upload of a model to the Hugging Face Hub and its use from there, on a stand-in for the Hub."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import yaml
from hub_server import hub_server
from PIL import Image
from pipelines import REPOSITORY
from small_adapters import DIGITS, trained

import pipeline
from pipeline.files import write_record
from pipeline.methods.adapter_file import save_adapter
from pipeline.report.metrics import MAP
from pipeline.report.model_card import model_card
from pipeline.report.summary import Summary, method_result

TOKEN, OTHER_TOKEN = "hf_" + "a" * 34, "hf_" + "b" * 34
TASKS = {"ink": DIGITS, "neon": DIGITS}


def summary(name: str = "demo") -> Summary:
    counts = {"ink": 400, "neon": 100}
    methods = {"grouped": method_result({"ink": 0.75, "neon": 0.5}, {"ink": 1.0, "neon": 1.0}, counts, 1036)}
    return Summary(name, list(TASKS), [["ink", "neon"]], {}, methods, 4, 11, "digits", [], counts)


@pytest.fixture
def run_folder(tmp_path):
    """The files of a finished run that the upload reads; its model is calibrated."""
    folder = tmp_path / "storage" / "runs" / "demo-1"
    (folder / "adapters").mkdir(parents=True)
    (folder / "report").mkdir()
    (folder / "config.yaml").touch()
    save_adapter(folder / "adapters" / "grouped.safetensors", trained("mmap", TASKS))
    pipeline.load(folder / "adapters" / "grouped.safetensors", temperature={"ink": 3.0}).save_options()
    write_record(folder / "report" / "summary.json", vars(summary()))
    return folder


class Finished(NamedTuple):
    status: int
    output: str
    errors: str


JOBS_IN_A_ROW = """
import contextlib, io, json, os, sys
from jobs.__main__ import run_script
for token, job, *arguments in json.load(sys.stdin):
    os.environ["HF_TOKEN"], sys.argv, status = token, [job, *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run_script(job)
        except SystemExit as end:
            status = end.code or 0
    print(json.dumps([status, output.getvalue(), errors.getvalue()]))
"""


@pytest.fixture
def run_with_hub(tmp_path):
    """Run jobs in a process of their own, which has its own idea of the Hub and its cache.

    (hub, or None without a network, *commands (token, job, *arguments)) → what each of them gave.
    """

    def call(hub, *commands):
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        if hub:
            env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        process = subprocess.run(
            [sys.executable, "-c", JOBS_IN_A_ROW],
            cwd=REPOSITORY,
            env=env,
            input=json.dumps([list(map(str, command)) for command in commands]),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return [Finished(*json.loads(line)) for line in process.stdout.splitlines()]

    return call


def test_a_model_is_uploaded_with_its_card_and_used_from_the_hub_and_its_cache(run_folder, run_with_hub, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 40), 80).convert("RGB").save(photo)
    with hub_server(TOKEN) as hub:
        pushed, online, refused, unknown = run_with_hub(
            hub,
            (TOKEN, "push", run_folder, "me/digits", "--license", "mit", "--private", "true"),
            (TOKEN, "predict", "hf-hub:me/digits", photo, "--task", "ink"),
            # Again, to the repository that exists, which the token of another may not write to.
            (OTHER_TOKEN, "push", run_folder, "me/digits"),
            (TOKEN, "predict", "hf-hub:me/other", photo),
        )
    assert pushed.status == online.status == 0, pushed.errors + online.errors
    assert hub.private == {"me/digits": True}
    files = hub.files["me/digits"]
    assert sorted(files) == ["README.md", "adapter.options.json", "adapter.safetensors"]
    assert files["adapter.safetensors"] == (run_folder / "adapters" / "grouped.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert 'pipeline.load("hf-hub:me/digits")' in card and "| ink | 10 | 75.0 ± 2.2 | 400 |" in card
    assert pushed.output == f"hf-hub:me/digits@{hub.commit_id('me/digits')}\n"
    assert refused.status == 2 and "log in with `hf auth login`" in refused.errors
    assert TOKEN not in pushed.output + pushed.errors + online.errors and "bbb" not in refused.errors
    assert unknown.errors.endswith(
        "error: hf-hub:me/other is not on the Hugging Face Hub, or is private or gated: correct the name, or log "
        "in with `hf auth login`\n"
    )
    (offline,) = run_with_hub(None, (TOKEN, "predict", pushed.output.strip(), photo, "--task", "ink"))
    assert offline.status == 0, offline.errors
    assert online.output == offline.output
    (row,) = csv.DictReader(io.StringIO(online.output))
    expected = pipeline.load(run_folder / "adapters" / "grouped.safetensors").predict(photo, "ink")
    assert (row["label"], row["probability"]) == (expected.label, f"{expected.probability:.4f}")
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--me--digits" / "snapshots").iterdir()
    assert pipeline.load(snapshot).predict(photo, "ink").probabilities == expected.probabilities
    (snapshot / "adapter.options.json").unlink()
    (incomplete,) = run_with_hub(None, (TOKEN, "predict", "hf-hub:me/digits", photo, "--task", "ink"))
    assert incomplete.status == 2 and "has no adapter.options.json in the cache" in incomplete.errors


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["digits"], TOKEN, "'digits' is not the name of a repository .* expected OWNER/NAME"),
        (["me/di gits"], TOKEN, "'me/di gits' is not the name of a repository"),
        (["me/digits"], "", "nobody is logged in .*`hf auth login`"),
        (["me/digits", "--method", "coop"], TOKEN, "no adapter of 'coop'; it has: grouped"),
    ],
)
def test_errors_are_reported_before_anything_is_uploaded(run_folder, monkeypatch, capsys, arguments, token, message):
    from jobs import push

    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    monkeypatch.setattr(sys, "argv", ["push.py", str(run_folder), *arguments])
    with pytest.raises(SystemExit) as exited:
        push.main()
    assert exited.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_card_of_tasks_with_several_labels_has_their_mean_average_precision():
    counts = {"ink": 400, "neon": 100}
    values, errors = {"ink": 0.75, "neon": 0.5}, {"ink": 0.04, "neon": 0.05}
    results = method_result(values, dict.fromkeys(counts, 1.0), counts, 1036, MAP, errors)
    arguments = replace(summary(), methods={"grouped": results}), "grouped", "me/digits", TASKS, "digits", None, False
    card = model_card(*arguments, None)
    assert "## Test mAP" in card and "| ink | 10 | 75.0 ± 4.0 | 400 |" in card
    assert "gets all classes" in card and "one of them nevertheless" not in card


def test_a_card_names_the_weights_that_the_model_needs():
    labels = {"ink": ["a|b", "*c*"], "neon": ["d"]}
    arguments = summary("my # data"), "grouped", "me/x_1", labels, "ViT-B-16"
    card = model_card(*arguments, "timm/vit", False, None)
    values = yaml.safe_load(card.split("---\n")[1])
    assert values["base_model"] == "timm/vit" and "license" not in values
    assert r"- ink: a\|b, \*c\*" in card and r"my \# data" in card and 'load("hf-hub:me/x_1")' in card
    card = model_card(*arguments, None, True, "cc-by-4.0")
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert 'load("hf-hub:me/x_1", pretrained="CLIP_WEIGHTS")' in card
