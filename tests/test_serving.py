"""The service: several models on one CLIP, mixed batches, replica failures, and the whole as users start it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from pipelines import PATIENCE_S, REPOSITORY
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from servers import BIN, RayCluster, Server, free_ports
from serving import (
    AUTHORIZATION,
    GROUP,
    SERVED,
    TOKEN,
    Service,
    get_response,
    kill_under_load,
    make_limits,
    run_closed_loop,
    send_request,
)
from small_methods import REFERENCES, SMALL, build_method

import pipeline
from jobs import serve
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, MmapConfig
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.registry import METHODS
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources
from pipeline.serving.dynamic_batcher import DynamicBatcher
from pipeline.serving.http_api import Answer, HttpApi
from pipeline.serving.ingress import Ingress
from pipeline.serving.mixed_batch import PredictRequest, predict_batch
from pipeline.serving.replica import ModelReplica
from pipeline.serving.shared_clip import check_one_clip, load_models

DIGITS = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
MIXED = {
    "a": ("mmap", [GROUP, {"pairs": ["zero", "one"]}]),
    "b": ("mmap", [{"ink": DIGITS}]),
    "c": ("coop", [GROUP]),
    "d": ("clip_adapter", [{"ink": DIGITS}]),
    "e": ("maple", [GROUP]),
    "f": ("full_finetune", [GROUP]),
}


def trained(method: str, *groups: dict[str, list[str]]) -> TrainedAdapter:
    """Return an adapter whose parameters differ from their initialization."""
    towers = load_clip(SMALL.clip)
    weights = weights_fingerprint(towers)
    states = (build_method(method, towers, group).state_dict() for group in groups)
    return merge_adapters(
        [TrainedAdapter(method, SMALL, weights, (group,), (state,)) for group, state in zip(groups, states)]
    )


def replace_clip(adapter: TrainedAdapter, weights: str | None = None, **clip) -> TrainedAdapter:
    config = adapter.config.model_copy(update={"clip": adapter.config.clip.model_copy(update=clip)})
    return TrainedAdapter(adapter.method, config, weights or adapter.weights, adapter.groups, adapter.states)


def weight_pointers(towers: ClipTowers) -> set[int]:
    return {value.data_ptr() for value in (*towers.parameters(), *towers.buffers())}


# One CLIP


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_methods_share_one_clip_without_changing_predictions(tmp_path, precision):
    models = {method: replace_clip(trained(method, GROUP), precision=precision) for method in METHODS}
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = {}
    for name, adapter in models.items():
        save_adapter(tmp_path / "single.safetensors", adapter)
        expected[name] = pipeline.load(tmp_path / "single.safetensors", device="cpu").predict_pixels(pixels)
    for reverse in (False, True):
        load_clip.cache_clear()
        names = sorted(models, reverse=reverse)
        loaded = load_models({name: (models[name], ModelOptions()) for name in names}, "cpu")
        shared = {name: model.classifier.towers for name, model in loaded.items()}
        float32_methods = {name for name in names if precision == "bfloat16" and METHODS[name].trains_weights}
        assert len({id(towers) for towers in shared.values()}) == (2 if float32_methods else 1)
        assert len({id(shared[name]) for name in float32_methods}) <= 1
        for name, model in loaded.items():
            task_towers = model.classifier.adaptation("ink").towers
            trains_weight = REFERENCES[name].trains_weight
            if name == "group_lora":  # towers for each task, with frozen weights
                trains_weight = lambda weight: False  # noqa: E731
            assert (task_towers is not None) == (trains_weight is not None)
            if task_towers is not None:
                assert not {value.data_ptr() for value in task_towers.parameters()} & weight_pointers(shared[name])
                # CLIP-SVD makes all matrices of the layers anew.
                layer = "conv1" if name == "clip_svd" else "transformer.resblocks.0.mlp.c_fc"
                matrix = f"visual.{layer}.weight"
                if not trains_weight(matrix):  # what it does not train it has from the shared towers
                    assert dict(task_towers.named_buffers())[matrix].data_ptr() in weight_pointers(shared[name])
        assert {name: model.predict_pixels(pixels) for name, model in loaded.items()} == expected
        assert {weights_fingerprint(towers) for towers in shared.values()} == {models["mmap"].weights}


def test_models_of_different_clips_are_rejected():
    adapter = trained("mmap", GROUP)
    before_sos = adapter.config.model_copy(update={"mmap": MmapConfig(text_prompt_position="before_sos")})
    for other_adapter, message in [
        (replace_clip(adapter, weights="0" * 64), "their weights differ"),
        (replace_clip(adapter, model="ViT-B-32", pretrained=None), "their model configs differ"),
        (replace_clip(adapter, quick_gelu=True), "their model configs differ"),
        (replace_clip(adapter, resize_mode="squash"), r"their clip.resize_mode differ \(shortest, squash\)"),
        (replace_clip(adapter, precision="bfloat16"), "their clip.precision differ"),
        (
            TrainedAdapter("mmap", before_sos, adapter.weights, adapter.groups, adapter.states),
            "their mmap.text_prompt_position differ",
        ),
        (replace_clip(adapter, pretrained="/nowhere/clip.pt"), "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            check_one_clip({"a": (adapter, ModelOptions()), "b": (other_adapter, ModelOptions())})
    compatible_adapter = replace_clip(trained("coop", GROUP), template="a {} of another text")
    check_one_clip({"a": (adapter, ModelOptions()), "b": (compatible_adapter, ModelOptions())})


# Mixed batches


@pytest.mark.parametrize("max_batch", [1, 5, 64])
def test_a_mixed_batch_predicts_as_each_request_alone_in_few_passes(monkeypatch, max_batch):
    options = ModelOptions(temperatures={"ink": 2.0}, threshold=0.4)
    models = load_models({name: (trained(method, *groups), options) for name, (method, groups) in MIXED.items()}, "cpu")
    random = torch.Generator().manual_seed(1)
    requests = []
    for number, (name, task) in enumerate(
        [(name, task) for name, model in models.items() for task in (*model.tasks, None, model.tasks[0])]
    ):
        pixels = torch.randint(0, 256, (1 + number % 3, 3, 32, 32), dtype=torch.uint8, generator=random)
        requests.append(PredictRequest(models[name], task, pixels))
    passes = []
    encode = ClipTowers.encode_image
    monkeypatch.setattr(ClipTowers, "encode_image", lambda *a, **k: passes.append(len(a[1])) or encode(*a, **k))
    batch_predictions = predict_batch(requests, max_batch)
    # Frozen (c and d), MmAP's prompts (a and b), MaPLe's, and the fine-tuned towers of f.
    assert len(passes) == 4 or (max_batch < 64 and max(passes) <= max_batch)
    for request, predictions in zip(requests, batch_predictions, strict=True):
        references = request.model.predict_pixels(request.pixels, request.task)
        for prediction, reference in zip(predictions, references, strict=True):
            assert (prediction.task, prediction.label) == (reference.task, reference.label)
            assert prediction.probabilities == pytest.approx(reference.probabilities, abs=1e-5)
            assert list(prediction.predictions_by_task) == list(reference.predictions_by_task)
            for task, guess in prediction.predictions_by_task.items():
                assert guess.probabilities == pytest.approx(reference.predictions_by_task[task].probabilities, abs=1e-5)


def run_batches(calls: Sequence[tuple[float, int]], **options) -> tuple[list[list[int]], list]:
    """Return the batches, each as the sizes of its calls, and the results of the calls; each call is (delay in seconds,
    size). A batch takes 0.2 s, and fails if it has a size of 13."""
    batches: list[list[int]] = []

    async def run(sizes: list[int]) -> list[int]:
        batches.append(sizes)
        await asyncio.sleep(0.2)
        if 13 in sizes:
            raise RuntimeError("the model failed")
        return [10 * size for size in sizes]

    async def all_calls() -> list:
        batcher = DynamicBatcher(run, lambda size: size, **{"max_size": 8, "wait_s": 0.02, **options})

        async def send(delay: float, size: int) -> int:
            await asyncio.sleep(delay)
            timeout_s = 0.05 if size == 5 else 5  # 5 is given up 0.12 s before its batch could run
            return await asyncio.wait_for(batcher.submit("client", size), timeout_s)

        return await asyncio.gather(*(send(*arguments) for arguments in calls), return_exceptions=True)

    results = asyncio.run(all_calls())
    return batches, results


def test_while_a_batch_runs_the_next_one_fills():
    one_by_one = [(0.03 * number, 1) for number in range(6)]
    assert run_batches(one_by_one) == ([[1], [1] * 5], [10] * 6)
    assert run_batches([(0, 1), (0.005, 2)])[0] == [[1, 2]]  # an idle model waits a little
    assert run_batches([(0, 1), (0.005, 2)], wait_s=0)[0] == [[1], [2]]
    assert run_batches([(0, 3)] * 5)[0] == [[3, 3], [3, 3], [3]]
    assert run_batches([(0, 20), (0, 1)], wait_s=1)[0] == [[20], [1]]  # a too large call is a batch by itself


def test_a_failed_batch_and_cancelled_calls():
    batches, results = run_batches([(0, 13), (0, 1), (0.1, 2)], max_size=14)
    assert batches == [[13, 1], [2]] and [str(result) for result in results] == ["the model failed"] * 2 + ["20"]
    batches, results = run_batches([(0, 8), (0.03, 5), (0.03, 2)])  # 5 is cancelled before its batch runs
    assert batches == [[8], [2]] and (results[0], results[2]) == (80, 20) and isinstance(results[1], TimeoutError)


# Replica failures


def ingress(monkeypatch, outcomes: Iterable) -> HttpApi:
    """Return an ingress whose calls to replicas have these outcomes, in order."""
    monkeypatch.setattr("pipeline.serving.ingress.RETRY_DELAY_S", 0.01)
    calls = iter(outcomes)

    async def predict(*arguments):
        outcome = next(calls)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    method = SimpleNamespace(remote=predict)
    replicas = SimpleNamespace(predict=method, ready=method)
    return Ingress(replicas, SERVED, Preprocessing(32), make_limits()).api


def test_the_ingress_retries_and_finally_gives_up(monkeypatch):
    answer = Answer([{"task": "ink", "label": "zero", "error": None}], 1)
    died, unavailable = ActorDiedError(), ActorUnavailableError("away", None)
    assert get_response(ingress(monkeypatch, [died, unavailable, died, answer]))[0] == 200
    status, content, _, _ = get_response(ingress(monkeypatch, [died] * 4 + [answer]))
    assert status == 503 and "ActorDiedError" in content["error"]
    model_error = RayTaskError("predict", "the model's traceback", RuntimeError("CUDA error"))
    assert get_response(ingress(monkeypatch, [model_error, answer]))[0] == 200  # another replica may work
    assert get_response(ingress(monkeypatch, [model_error] * 4 + [answer]))[0] == 500
    assert get_response(ingress(monkeypatch, [died]), path="/health", method="GET")[0] == 503
    assert get_response(ingress(monkeypatch, [True]), path="/health", method="GET")[0] == 200


def test_a_large_request_is_split_into_calls():
    sizes = []

    async def predict(client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        sizes.append(pixels.nbytes)
        return Answer([{"label": int(image[0, 0, 0])} for image in pixels], len(pixels))

    replicas = SimpleNamespace(predict=SimpleNamespace(remote=predict))
    server = Ingress(replicas, SERVED, Preprocessing(224), make_limits())
    pixels = np.zeros((64, 3, 224, 224), np.uint8) + np.arange(64, dtype=np.uint8)[:, None, None, None]
    answer = asyncio.run(server._predict("client", "digits", "ink", pixels))
    assert [record["label"] for record in answer.records] == list(range(64)) and answer.batch_size == 20
    assert len(sizes) == 4 and max(sizes) < 4 * 2**20  # which is what a gRPC server takes by default


def test_a_replica_whose_model_fails_is_not_healthy(monkeypatch):
    adapters = {"m": (trained("mmap", GROUP), ModelOptions())}
    replica = ModelReplica(lambda: adapters, WorkerResources(1, 0.0), 4, 0.01)
    asyncio.run(replica.check_health())

    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ClipTowers, "encode_image", fails)
    with pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(replica.check_health())


# Errors in the command are reported before anything starts


def test_errors_in_the_command_exit_with_status_2(tmp_path, monkeypatch, capsys):
    for name, adapter in [
        ("mmap", trained("mmap", GROUP)),
        ("other", replace_clip(trained("mmap", GROUP), weights="0" * 64)),
    ]:
        save_adapter(tmp_path / f"{name}.safetensors", adapter)
    valid = ["--models", f"a={tmp_path}/mmap.safetensors"]
    (port,) = free_ports(1, start=8300)
    with socket.create_server(("127.0.0.1", port)):
        for arguments, message in [
            (["--models", f"{tmp_path}/mmap.safetensors"], "expected NAME=SOURCE"),
            (["--models", "a/b=x"], "expected NAME=SOURCE, with a name of letters"),
            (["--models", "a="], "expected NAME=SOURCE"),
            (["--models", f"a={tmp_path}/absent.safetensors"], "does not exist"),
            ([*valid, valid[1]], "duplicate name 'a'"),
            ([*valid, f"b={tmp_path}/other.safetensors"], "'a' and 'b' cannot share a CLIP: their weights"),
            ([*valid, "--clip.pretrained", "/nowhere/clip.pt"], "clip.pretrained=/nowhere/clip.pt: no such file"),
            ([*valid, "--port", str(port)], f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use"),
            ([*valid, "--host", "192.0.2.77"], "cannot listen on --host 192.0.2.77"),
            ([*valid, "--host", "no.such.host.invalid"], "cannot listen on --host no.such.host.invalid"),
            ([*valid, "--port", "0"], "port=0: must be greater than or equal to 1"),
            ([*valid, "--replicas", "0"], "replicas=0: must be greater than or equal to 1"),
            (
                [*valid, "--cluster.gpus_per_worker", "-1"],
                "cluster.gpus_per_worker=-1: must be greater than",
            ),
            ([*valid, "--token_file", str(tmp_path / "absent")], "absent cannot be read: No such file or directory"),
            ([*valid, "--trusted_proxies", "proxy.example"], "expected an address or a network, such as 10.0.0.5"),
            ([*valid, "--max_buffered_mib", "5"], "--max_buffered_mib 5 is less than --max_request_mib 10"),
            ([*valid, "--max_client_share", "2"], "max_client_share=2: must be less than or equal to 1"),
            ([*valid, "--max_request_mib", "nan"], "max_request_mib='nan': must be"),
            ([*valid, "--timeout_s", "inf"], "timeout_s='inf': must be a finite number"),
            ([*valid, "--batch_wait_ms", "-1"], "batch_wait_ms=-1: must be greater than or equal to 0"),
        ]:
            monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
            with pytest.raises(SystemExit) as end:
                serve.main()
            assert end.value.code == 2, arguments
            assert message in capsys.readouterr().err, arguments


def test_addresses_that_only_this_machine_reaches():
    assert all(map(serve.is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(serve.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "a.example")))


# The service itself


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    files = {}
    for name in ("a", "c", "f"):
        method, groups = MIXED[name]
        files[name] = folder / f"{name}.safetensors"
        save_adapter(files[name], trained(method, *groups))
    adapter = trained("mmap", *MIXED["a"][1])
    files["labels"] = folder / "labels.safetensors"  # of images with several labels
    save_adapter(files["labels"], replace(adapter, logit_biases=dict.fromkeys(adapter.class_names, -1.0)))
    return files


@pytest.fixture(scope="module")
def service(adapter_files, tmp_path_factory):
    (port,) = free_ports(1, start=8400)
    models = ["--models", *(f"{name}={adapter_file}" for name, adapter_file in adapter_files.items())]
    limits = ["--max_request_mib", "6", "--max_images", "8", "--batch_wait_ms", "20"]
    folder = tmp_path_factory.mktemp("service")
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    options = ["--replicas", "2", "--token_file", str(folder / "token"), *limits]
    running = Service(folder, port, *models, *options)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def images(digits) -> list[bytes]:
    return [path.read_bytes() for path in sorted((digits / "ink_left").rglob("*.png"))[::11]]


def fetch_json(url: str, body: bytes | None = None, content_type: str = "image/png"):
    """Return (status, JSON)."""
    headers = {"Content-Type": content_type, **AUTHORIZATION} if body is not None else AUTHORIZATION
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_the_service_answers_as_pipeline_load_does(service, adapter_files, images):
    broken = b"no image"
    for name, adapter_file in adapter_files.items():
        model = pipeline.load(adapter_file)
        for task in (model.tasks[0], model.tasks[-1], None):
            query = f"?task={task}" if task else ""
            expected = model.predict([*images[:3], broken], task)
            body = {"images": [base64.b64encode(image).decode() for image in (*images[:3], broken)]}
            status, content = fetch_json(
                f"{service.url}/models/{name}/predict{query}", json.dumps(body).encode(), "application/json"
            )
            assert status == 200
            for served, prediction in zip(content["predictions"], expected, strict=True):
                record = prediction.to_dict()
                for field in ("task", "label", "error"):
                    assert served[field] == record[field]
                assert served["probability"] == pytest.approx(record["probability"], abs=1e-5)
                assert served["probabilities"] == pytest.approx(record["probabilities"], abs=1e-5)
                labels = [guess["label"] for guess in served["predictions_by_task"]]
                assert labels == [guess["label"] for guess in record["predictions_by_task"]]
            status, single = fetch_json(f"{service.url}/models/{name}/predict{query}", images[0])
            assert status == 200 and single["label"] == content["predictions"][0]["label"]


@pytest.mark.slow
def test_the_models_and_health_endpoints(service, adapter_files):
    assert fetch_json(f"{service.url}/health") == (200, {"status": "ready"})
    status, content = fetch_json(f"{service.url}/models")
    assert status == 200 and list(content["models"]) == list(adapter_files)
    adapter = load_adapter(adapter_files["a"])
    assert content["models"]["a"] == {
        "method": "MmAP",
        "clip": BUILTIN_DIGITS,
        "weights": adapter.weights,
        "image_size": 32,
        "tasks": adapter.class_names,
        "threshold": None,
        "temperatures": {},
        "multi_label": False,
    }
    assert content["models"]["labels"] == content["models"]["a"] | {"multi_label": True}


@pytest.mark.slow
def test_limits_and_errors_reach_the_client_through_serve(service, images):
    predict = f"{service.url}/models/a/predict"
    assert fetch_json(f"{service.url}/nothing")[0] == 404
    assert fetch_json(f"{predict}?task=oil", images[0])[0] == 422
    assert fetch_json(predict, b"no image")[0] == 422
    assert fetch_json(predict, images[0], "text/plain")[0] == 415
    assert fetch_json(predict, json.dumps({"images": ["/w"] * 9}).encode(), "application/json")[0] == 413
    host, port = service.url.removeprefix("http://").split(":")
    path = f"/models/a/predict HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
    head = f"POST {path}Content-Type: image/png\r\n"
    for header_end, is_endless in [
        ("Content-Length: 99999999999\r\n\r\n", False),  # and nothing comes: the answer does not wait for it
        ("Transfer-Encoding: chunked\r\n\r\n", True),  # without end
        ("Content-Length: nonsense\r\n\r\n", False),
    ]:
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall((head + header_end).encode())
            stop = threading.Event()

            def send_chunks(connection=connection, stop=stop):
                chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
                try:
                    while not stop.is_set():
                        connection.sendall(chunk)
                except OSError:
                    pass  # it was cut off

            if is_endless:
                threading.Thread(target=send_chunks, daemon=True).start()
            answer = connection.recv(1000).decode()
            stop.set()
        assert answer.startswith("HTTP/1.1 400" if "nonsense" in header_end else "HTTP/1.1 413"), answer
    websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    websocket += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    expectation = f"{head}Content-Length: {len(images[0])}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    one_request = expectation.replace("Expect: 100-continue\r\nConnection: close\r\n", "").encode() + images[0]
    for request, expected in [
        (f"GET {path}{websocket}".encode(), "HTTP/1.1 403"),
        (expectation.encode() + images[0], "HTTP/1.1 100"),
        (one_request + one_request.replace(b"Host", b"Connection: close\r\nHost"), "HTTP/1.1 200"),  # pipelined
        (f"OPTIONS {path}Connection: close\r\n\r\n".encode(), "HTTP/1.1 405"),
        (f"HEAD {path.replace('/a/predict', '')}Connection: close\r\n\r\n".encode(), "HTTP/1.1 200"),
        (f"{head}Content-Encoding: gzip\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode(), "HTTP/1.1 415"),
    ]:
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(2**16):
                answer += part
        assert answer.decode().startswith(expected) and b"Traceback" not in answer, (request, answer)
        assert answer.count(b"HTTP/1.1 ") == (2 if expected.endswith("100") or request.count(b"POST") == 2 else 1)
    large = io.BytesIO()  # more than Serve's gRPC takes in one message
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), dtype=np.uint8)).save(large, "PNG")
    assert large.tell() > 5_000_000 and fetch_json(predict, large.getvalue())[0] == 200
    assert fetch_json(predict, images[0])[0] == 200


@pytest.mark.slow
def test_the_token_is_needed_and_shown_nowhere(service, images):
    predict = f"{service.url}/models/a/predict"
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for url in (predict, f"{service.url}/metrics"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
            assert error.value.code == 401 and error.value.headers["WWW-Authenticate"].startswith("Bearer")
    assert urllib.request.urlopen(f"{service.url}/health", timeout=60).status == 200
    request = urllib.request.Request(f"{service.url}/metrics", headers=AUTHORIZATION)
    assert b"mmap_clip_rejected_requests_total" in urllib.request.urlopen(request, timeout=60).read()
    family = psutil.Process(service.process.pid).children(recursive=True)
    assert TOKEN not in service.log.read_text()
    words = [word for process in family for word in process.cmdline()]
    session = next(word for word in words if word.startswith(("--session-dir=", "--session_dir=")))
    logs = Path(session.partition("=")[2]) / "logs"
    assert logs.is_dir()
    for process in family:
        assert TOKEN not in " ".join(process.cmdline()) and TOKEN not in str(process.environ())
    # Without --trusted_proxies no header names the client. (Titles of Ray's workers overwrite their environment.)
    assert {process.environ().get("FORWARDED_ALLOW_IPS") for process in family} - {None} == {""}
    for log in logs.rglob("*"):
        assert not log.is_file() or TOKEN.encode() not in log.read_bytes(), log


@pytest.mark.slow
def test_requests_of_all_models_run_in_batches_and_get_their_own_answers(service, adapter_files, images):
    models = {name: pipeline.load(adapter_file) for name, adapter_file in adapter_files.items()}
    requests = [(name, task, i) for i in range(8) for name in models for task in ("ink", None)]

    async def run():
        async with aiohttp.ClientSession() as session:
            urls = [f"{service.url}/models/{n}/predict" + (f"?task={t}" if t else "") for n, t, _ in requests]
            return await asyncio.gather(
                *(send_request(session, url, images[i]) for url, (*_, i) in zip(urls, requests))
            )

    replies = asyncio.run(run())
    for (name, task, i), reply in zip(requests, replies, strict=True):
        (expected,) = models[name].predict([images[i]], task)
        assert reply.status == 200 and reply.record["label"] == expected.label
        assert reply.record["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert max(reply.batch_size for reply in replies) >= 4


@pytest.mark.fault_injection
def test_a_killed_replica_loses_no_request(service, adapter_files, images):
    replica_pids = {process.pid for process in service.processes("ModelReplica")}
    assert len(replica_pids) == 2
    expected = [prediction.label for prediction in pipeline.load(adapter_files["a"]).predict(images, "ink")]

    def kill_one() -> None:
        kill_under_load(psutil.Process(min(replica_pids)))

    replies, _ = run_closed_loop(f"{service.url}/models/a/predict?task=ink", images, 16, 4, kill_one)
    assert len(replies) > 50 and not psutil.pid_exists(min(replica_pids))
    assert [(reply.status, reply.record["label"]) for _, reply in replies] == [(200, expected[i]) for i, _ in replies]
    end = time.monotonic() + PATIENCE_S
    while len(service.processes("ModelReplica")) < 2:
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.fault_injection
def test_on_a_cluster_it_is_the_only_service_and_leaves_the_address_free(adapter_files, images, tmp_path):
    cluster = RayCluster(tmp_path)
    try:
        port, job_port = free_ports(2, start=8500)

        def job(adapter_file: Path, *options: str) -> tuple[int, str]:
            job = [sys.executable, "jobs/serve.py", "--cluster.address", cluster.gcs, "--port", str(job_port)]
            env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            job += ["--models", f"m={adapter_file}", *options]
            finished = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, env=env, timeout=600)
            return finished.returncode, finished.stderr

        service = Service(tmp_path, port, "--cluster.address", cluster.gcs, "--models", f"a={adapter_files['a']}")
        try:
            expected = pipeline.load(adapter_files["a"]).predict(images[:1], "ink")[0].label
            assert fetch_json(f"{service.url}/models/a/predict?task=ink", images[0])[1]["label"] == expected
            status, stderr = job(adapter_files["a"])
            assert status == 2 and "(applications: mmap-clip-models, mmap-clip-ingress)" in stderr
            assert service.end() == 0
        finally:
            service.kill()
        with socket.create_server(("127.0.0.1", port)):
            pass
        status, stderr = job(adapter_files["a"], "--replicas", "3")
        assert (
            status == 2
            and "--replicas 3 of 1 CPU each do not fit: the cluster has" in stderr
            and "enough for 2" in stderr
        )
        config = SMALL.model_copy(update={"mmap": MmapConfig(prompt_length=4, source_rows=4)})
        towers = load_clip(SMALL.clip)
        states = (build_method("mmap", towers, GROUP, config).state_dict(),)
        misfit = TrainedAdapter("mmap", SMALL, weights_fingerprint(towers), (GROUP,), states)
        save_adapter(tmp_path / "misfit.safetensors", misfit)
        status, stderr = job(tmp_path / "misfit.safetensors")
        assert status == 2 and "a replica failed to start: the adapter of ink, neon does not fit MmAP" in stderr
        run_the_rayservice(tmp_path, cluster.gcs, port, adapter_files["a"], images[0], expected)
    finally:
        cluster.stop()


def run_the_rayservice(folder: Path, address: str, port: int, adapter_file: Path, image: bytes, label: str) -> None:
    """The Serve config of KubeRay's RayService, with a model, a port and resources of this machine."""
    manifest = yaml.safe_load((REPOSITORY / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    changes = {"models": [f"a={adapter_file}"], "token_file": str(folder / "token"), "replicas": 1}
    config["applications"][0]["args"] |= {**changes, "cpus_per_worker": 1, "gpus_per_worker": 0}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "serve"), "run", "--address", address, str(folder / "serve.yaml")]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    server = Server(command, folder / "serve-run.log", environment, f"{url}/health")
    try:
        predict = f"{url}/models/a/predict?task=ink"
        assert fetch_json(predict, image)[1]["label"] == label
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(predict, data=image)
        assert TOKEN not in (folder / "serve-run.log").read_text()
    finally:
        server.kill()


@pytest.mark.slow
def test_shutdown_answers_pending_requests_and_leaves_no_process(service, images):
    async def run():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            url = f"{service.url}/models/a/predict"
            pending = [asyncio.create_task(send_request(session, url, images[i % len(images)])) for i in range(60)]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            shutdown = asyncio.create_task(asyncio.to_thread(service.end))
            return [(await reply).status for reply in pending], await shutdown

    statuses, status = asyncio.run(run())
    assert statuses == [200] * 60 and status == 0, service.log.read_text()
    assert "Traceback" not in service.log.read_text()
