"""The service: several models on one CLIP, mixed batches, what HTTP answers to all that clients send, lost replicas."""

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
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import PATIENCE_S, REPOSITORY
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from servers import RayCluster, free_ports
from serving import Service, ask, closed_loop, kill_at_work
from small_methods import REFERENCES, SMALL, build_method
from starlette.requests import Request

import pipeline
from jobs import serve
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.towers import ClipTowers
from pipeline.config import BUILTIN_DIGITS, MmapConfig
from pipeline.demo.digits import write_digits
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.registry import METHODS
from pipeline.prediction.options import ModelOptions
from pipeline.runtime.cluster import WorkerResources
from pipeline.serving.dynamic_batcher import DynamicBatcher
from pipeline.serving.http_api import Answer, HttpApi, Limits, NoReplicaError, ServedModel
from pipeline.serving.ingress import Ingress
from pipeline.serving.mixed_batch import PredictRequest, predict_batch
from pipeline.serving.replica import ModelReplica
from pipeline.serving.shared_clip import check_one_clip, load_models

DIGITS = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
GROUP = {"ink": ["zero", "one", "two"], "neon": ["zero", "one", "two"]}
MIXED = {
    "a": ("mmap", [GROUP, {"pairs": ["zero", "one"]}]),
    "b": ("mmap", [{"ink": DIGITS}]),
    "c": ("coop", [GROUP]),
    "d": ("clip_adapter", [{"ink": DIGITS}]),
    "e": ("maple", [GROUP]),
    "f": ("full_finetune", [GROUP]),
}


def trained(method: str, *groups: dict[str, list[str]]) -> TrainedAdapter:
    """Its numbers are away from where a training begins."""
    towers = load_clip(SMALL.clip)
    weights = weights_fingerprint(towers)
    states = (build_method(method, towers, group).state_dict() for group in groups)
    return merge_adapters(
        [TrainedAdapter(method, SMALL, weights, (group,), (state,)) for group, state in zip(groups, states)]
    )


def with_clip(prompts: TrainedAdapter, weights: str | None = None, **clip) -> TrainedAdapter:
    config = prompts.config.model_copy(update={"clip": prompts.config.clip.model_copy(update=clip)})
    return TrainedAdapter(prompts.method, config, weights or prompts.weights, prompts.groups, prompts.states)


def weights_of(towers: ClipTowers) -> set[int]:
    return {value.data_ptr() for value in (*towers.parameters(), *towers.buffers())}


# One CLIP


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_methods_share_one_clip_and_predict_as_they_do_alone(tmp_path, precision):
    models = {method: with_clip(trained(method, GROUP), precision=precision) for method in METHODS}
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = {}
    for name, prompts in models.items():
        save_adapter(tmp_path / "alone.safetensors", prompts)
        alone[name] = pipeline.load(tmp_path / "alone.safetensors", device="cpu").predict_pixels(pixels)
    for reverse in (False, True):
        load_clip.cache_clear()
        names = sorted(models, reverse=reverse)
        loaded = load_models({name: (models[name], ModelOptions()) for name in names}, "cpu")
        shared = {name: model.classifier.towers for name, model in loaded.items()}
        in_float32 = {name for name in names if precision == "bfloat16" and METHODS[name].trains_weights}
        assert len({id(towers) for towers in shared.values()}) == (2 if in_float32 else 1)
        assert len({id(shared[name]) for name in in_float32}) <= 1
        for name, model in loaded.items():
            own = model.classifier.adaptation("ink").towers
            trains_weight = REFERENCES[name].trains_weight
            assert (own is not None) == (trains_weight is not None)
            if own is not None:
                assert not {value.data_ptr() for value in own.parameters()} & weights_of(shared[name])
                matrix = "visual.transformer.resblocks.0.mlp.c_fc.weight"
                if not trains_weight(matrix):  # what it does not train it has from the shared towers
                    assert dict(own.named_buffers())[matrix].data_ptr() in weights_of(shared[name])
        assert {name: model.predict_pixels(pixels) for name, model in loaded.items()} == alone
        assert {weights_fingerprint(towers) for towers in shared.values()} == {models["mmap"].weights}


def test_models_of_different_clips_are_refused():
    one = trained("mmap", GROUP)
    before_sos = one.config.model_copy(update={"mmap": MmapConfig(text_prompt_position="before_sos")})
    for other, message in [
        (with_clip(one, weights="0" * 64), "their weights differ"),
        (with_clip(one, model="ViT-B-32", pretrained=None), "their clip.model differ"),
        (with_clip(one, quick_gelu=True), "their model configs differ"),
        (with_clip(one, precision="bfloat16"), "their clip.precision differ"),
        (
            TrainedAdapter("mmap", before_sos, one.weights, one.groups, one.states),
            "their mmap.text_prompt_position differ",
        ),
        (with_clip(one, pretrained="/nowhere/clip.pt"), "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            check_one_clip({"a": (one, ModelOptions()), "b": (other, ModelOptions())})
    same = with_clip(trained("coop", GROUP), template="a {} of another text")
    check_one_clip({"a": (one, ModelOptions()), "b": (same, ModelOptions())})


# Mixed batches


@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_a_mixed_batch_predicts_as_each_request_alone_in_few_passes(monkeypatch, at_once):
    options = ModelOptions(temperatures={"ink": 2.0}, threshold=0.4)
    models = load_models({name: (trained(method, *groups), options) for name, (method, groups) in MIXED.items()}, "cpu")
    random = torch.Generator().manual_seed(1)
    asked = []
    for number, (name, task) in enumerate(
        [(name, task) for name, model in models.items() for task in (*model.tasks, None, model.tasks[0])]
    ):
        pixels = torch.randint(0, 256, (1 + number % 3, 3, 32, 32), dtype=torch.uint8, generator=random)
        asked.append(PredictRequest(models[name], task, pixels))
    passes = []
    encode = ClipTowers.encode_image
    monkeypatch.setattr(ClipTowers, "encode_image", lambda *a, **k: passes.append(len(a[1])) or encode(*a, **k))
    together = predict_batch(asked, at_once)
    # Frozen (c and d), MmAP's prompts (a and b), MaPLe's, and the fine-tuned towers of f.
    assert len(passes) == 4 or (at_once < 64 and max(passes) <= at_once)
    for one, found in zip(asked, together, strict=True):
        for prediction, alone in zip(found, one.model.predict_pixels(one.pixels, one.task), strict=True):
            assert (prediction.task, prediction.label) == (alone.task, alone.label)
            assert prediction.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
            assert list(prediction.predictions_by_task) == list(alone.predictions_by_task)
            for task, guess in prediction.predictions_by_task.items():
                assert guess.probabilities == pytest.approx(alone.predictions_by_task[task].probabilities, abs=1e-5)


def batches_of(calls: Sequence[tuple[float, int]], **options) -> tuple[list[list[int]], list]:
    """The batches, each as the sizes of its calls, and what became of the calls; each is (seconds until it comes,
    size). A batch takes 0.2 s, and fails if there is a size of 13."""
    ran: list[list[int]] = []

    async def run(sizes: list[int]) -> list[int]:
        ran.append(sizes)
        await asyncio.sleep(0.2)
        if 13 in sizes:
            raise RuntimeError("the model failed")
        return [10 * size for size in sizes]

    async def all_calls() -> list:
        batcher = DynamicBatcher(run, lambda size: size, **{"max_size": 8, "wait_s": 0.02, **options})

        async def call(after: float, size: int) -> int:
            await asyncio.sleep(after)
            return await asyncio.wait_for(batcher.submit(size), 0.15 if size == 5 else 5)

        return await asyncio.gather(*(call(*one) for one in calls), return_exceptions=True)

    results = asyncio.run(all_calls())
    return ran, results


def test_while_a_batch_runs_the_next_one_fills():
    one_by_one = [(0.03 * number, 1) for number in range(6)]
    assert batches_of(one_by_one) == ([[1], [1] * 5], [10] * 6)
    assert batches_of([(0, 1), (0.005, 2)])[0] == [[1, 2]]  # an idle model waits a little
    assert batches_of([(0, 1), (0.005, 2)], wait_s=0)[0] == [[1], [2]]
    assert batches_of([(0, 3)] * 5)[0] == [[3, 3], [3, 3], [3]]
    assert batches_of([(0, 20), (0, 1)], wait_s=1)[0] == [[20], [1]]  # a call that is too large is one by itself


def test_a_batch_that_fails_and_calls_that_were_given_up():
    ran, results = batches_of([(0, 13), (0, 1), (0.1, 2)], max_size=14)
    assert ran == [[13, 1], [2]] and [str(result) for result in results] == ["the model failed"] * 2 + ["20"]
    ran, (first, second, third) = batches_of([(0, 8), (0.03, 5), (0.03, 2)])  # 5 gives up before its batch runs
    assert ran == [[8], [2]] and (first, third) == (80, 20) and isinstance(second, TimeoutError)


# HTTP, without Ray

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SERVED = {"digits": ServedModel("MmAP", "ViT", "0" * 64, GROUP, None, {})}


def api(predict=None, ready: bool = True, **limits) -> HttpApi:
    async def first_class(model: str, task: str | None, pixels: np.ndarray) -> Answer:
        assert pixels.shape[1:] == (3, 32, 32) and pixels.dtype == np.uint8
        record = {
            "task": task,
            "label": "zero",
            "probability": 1.0,
            "probabilities": {},
            "error": "",
            "predictions_by_task": [],
        }
        return Answer([record] * len(pixels), len(pixels))

    async def is_ready() -> bool:
        return ready

    values = {"max_request_bytes": 2000, "max_images": 3, "max_waiting": 2, "timeout_s": 5.0, "decoding_threads": 1}
    return HttpApi(SERVED, 32, Limits(**{**values, **limits}), predict or first_class, is_ready)


async def call(
    served: HttpApi,
    path: str = "/models/digits/predict",
    body: bytes | Sequence[bytes] = PNG,
    kind: str | None = "image/png",
    query: bytes = b"",
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
):
    """(status, JSON, headers, number of the body's chunks that were read)."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    sent = iter(chunks)
    num_read = 0

    async def receive():
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": next(sent), "more_body": num_read < len(chunks)}

    given_headers = [*headers, *([(b"content-type", kind.encode("latin-1"))] if kind else [])]
    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": given_headers}
    response = await served(Request(scope, receive))
    return response.status_code, json.loads(response.body), response.headers, num_read


def answered(served: HttpApi, *arguments, **options):
    return asyncio.run(call(served, *arguments, **options))


def as_json(**values) -> dict:
    return {"body": json.dumps(values).encode(), "kind": "application/json; charset=utf-8"}


def test_every_refusal_says_what_to_do():
    image = base64.b64encode(PNG).decode()
    for arguments, status, message in [
        ({"path": "/"}, 404, "unknown path; the endpoints are GET /health, GET /models, POST /models/<model>/predict"),
        ({"path": "/models/digits/predict/"}, 404, "unknown path"),
        ({"path": "/models/letters/predict"}, 404, "unknown model 'letters'; the models are digits"),
        ({"method": "GET"}, 405, "method GET not allowed"),
        ({"path": "/health"}, 405, "method POST not allowed"),
        ({"kind": "application/x-www-form-urlencoded"}, 415, "send an image as image/*, or several as application/jso"),
        ({"kind": None}, 415, "unsupported Content-Type ''"),
        ({"query": b"task=oil"}, 422, "unknown task 'oil'; model 'digits' has the tasks ink, neon"),
        ({"query": b"tsk=ink"}, 422, "unknown query parameter 'tsk'; the only one is task"),
        ({"query": b"task=ink&task=neon"}, 422, "task is given more than once"),
        ({"query": b"task=%00%1b[31m%ff"}, 422, "\\x00\\x1b[31m"),
        ({"body": b""}, 422, "no bytes"),
        ({"body": PNG[:40]}, 422, "known format"),
        ({"body": b"not an image"}, 422, "no image of a known format"),
        ({"body": bytes(2001)}, 413, "exceeds 2,000 bytes"),
        ({"body": b"{", "kind": "application/json"}, 400, "the body is not valid JSON"),
        ({"body": b"[" * 1900, "kind": "application/json"}, 400, "the body is not valid JSON"),
        ({"body": b"\xff\xfe\x00", "kind": "application/json"}, 400, "the body is not valid JSON"),
        (as_json(images=image), 422, "images must be a list of base64 strings"),
        (as_json(images=[]), 422, "images must be a list"),
        (as_json(images=[image, 3]), 422, "images must be a list"),
        (as_json(image=[image]), 422, 'invalid JSON body; expected {"images"'),
        (as_json(images=[image], task=3), 422, "task must be a string"),
        (as_json(images=[image] * 4), 413, "4 images exceed the limit of 3"),
        (as_json(images=[image], task="oil"), 422, "unknown task 'oil'"),
        (
            {**as_json(images=[image], task="ink"), "query": b"task=neon"},
            422,
            "task is 'ink' in the body but 'neon' in",
        ),
    ]:
        found, told, headers, _ = answered(api(), **arguments)
        assert found == status and message in told["error"], (arguments, found, told)
        assert (found == 405) == ("allow" in headers)


def test_answers_have_the_fields_of_mlflow_and_broken_images_their_error():
    status, record, headers, _ = answered(api(), query=b"task=ink")
    assert status == 200 and record["label"] == "zero" and headers["x-batch-size"] == "1"
    assert list(record) == ["task", "label", "probability", "probabilities", "error", "predictions_by_task"]
    good, broken = base64.b64encode(PNG).decode(), base64.b64encode(b"no image").decode()
    status, told, headers, _ = answered(api(), **as_json(images=[broken, good, "no base64!"], task="ink"))
    assert status == 200 and headers["x-batch-size"] == "1"
    first, second, third = told["predictions"]
    assert second == record and "known format" in first["error"] and third["error"].startswith("not base64")
    assert list(first) == list(record) and first["label"] is None and first["task"] == "ink"
    status, told, _, _ = answered(api(), **as_json(images=[broken]))  # the model is not asked
    assert status == 200 and told["predictions"][0]["error"]


def test_too_large_a_body_is_not_read_to_its_end():
    status, _, _, num_read = answered(api(), headers=[(b"content-length", b"2001")], body=[b"x"] * 9)
    assert (status, num_read) == (413, 0)
    status, _, _, num_read = answered(api(), body=[bytes(700)] * 100)
    assert (status, num_read) == (413, 3)
    status, _, _, num_read = answered(api(), body=[PNG[:30], b"", PNG[30:]])
    assert (status, num_read) == (200, 3)


def test_too_many_requests_are_told_to_come_again_before_they_are_read():
    async def run():
        free = asyncio.Event()

        async def slow(model, task, pixels):
            await free.wait()
            return Answer([{"error": ""}], 1)

        served = api(slow)
        held = [asyncio.create_task(call(served)) for _ in range(2)]
        await asyncio.sleep(0.2)
        status, told, headers, num_read = await call(served)
        assert (status, headers["retry-after"], num_read) == (503, "1", 0) and "2 requests are in flight" in told[
            "error"
        ]
        free.set()
        assert [(await one)[0] for one in held] == [200, 200]
        assert (await call(served))[0] == 200  # their places are free again

    asyncio.run(run())


def test_requests_that_take_too_long_and_replicas_that_are_gone():
    async def never(model, task, pixels):
        await asyncio.Event().wait()

    async def gone(model, task, pixels):
        raise NoReplicaError("ActorDiedError")

    status, told, _, _ = answered(api(never, timeout_s=0.2))
    assert status == 504 and "timeout after 0.2 s" in told["error"]
    status, told, headers, _ = answered(api(gone))
    assert status == 503 and "ActorDiedError" in told["error"] and headers["retry-after"] == "1"
    assert answered(api(), path="/health", method="GET")[:2] == (200, {"status": "ready"})
    assert answered(api(ready=False), path="/health", method="GET")[0] == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ALMOST = st.fixed_dictionaries({}, optional={"images": JSON, "task": JSON, "more": JSON})


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300) | (JSON | ALMOST).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["application/json", "image/png", "application/octet-stream"]) | st.text(max_size=20),
    st.binary(max_size=40),
    st.text(max_size=20).map("/models/digits/{}".format) | st.just("/models/digits/predict") | st.text(max_size=20),
)
def test_whatever_is_sent_is_answered_as_the_clients_fault(body, kind, query, path):
    kind = kind.encode("latin-1", "replace").decode("latin-1")
    status, told, _, _ = answered(api(max_request_bytes=10_000), path, body, kind, query)
    assert 400 <= status < 500 or (status == 200 and told["predictions"][0]["error"]), (status, told)


# Replicas that die, and those that must be replaced


def ingress(monkeypatch, outcomes: Iterable) -> Ingress:
    """Before replicas whose calls end so, one after the other."""
    monkeypatch.setattr("pipeline.serving.ingress.RETRY_DELAY_S", 0.01)
    calls = iter(outcomes)

    async def called(*arguments):
        outcome = next(calls)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    call_ = SimpleNamespace(remote=called)
    return Ingress(SimpleNamespace(predict=call_, ready=call_), SERVED, 32, Limits(2000, 3, 2, 5.0, 1))


def test_the_ingress_asks_again_and_gives_up_in_the_end(monkeypatch):
    answer = Answer([{"task": "ink", "label": "zero", "error": ""}], 1)
    dies, gone = ActorDiedError(), ActorUnavailableError("away", None)
    assert answered(ingress(monkeypatch, [dies, gone, dies, answer]))[0] == 200
    status, told, _, _ = answered(ingress(monkeypatch, [dies] * 4 + [answer]))
    assert status == 503 and "ActorDiedError" in told["error"]
    fault = RayTaskError("predict", "the model's traceback", RuntimeError("CUDA error"))
    assert answered(ingress(monkeypatch, [fault, answer]))[0] == 200  # another replica may be whole
    with pytest.raises(RayTaskError):
        answered(ingress(monkeypatch, [fault] * 4 + [answer]))
    assert answered(ingress(monkeypatch, [dies]), path="/health", method="GET")[0] == 503
    assert answered(ingress(monkeypatch, [True]), path="/health", method="GET")[0] == 200


def test_a_large_request_is_asked_for_in_parts():
    sizes = []

    async def called(model: str, task: str | None, pixels: np.ndarray) -> Answer:
        sizes.append(pixels.nbytes)
        return Answer([{"label": int(image[0, 0, 0])} for image in pixels], len(pixels))

    before = Ingress(SimpleNamespace(predict=SimpleNamespace(remote=called)), SERVED, 224, Limits(2000, 64, 2, 5.0, 1))
    pixels = np.zeros((64, 3, 224, 224), np.uint8) + np.arange(64, dtype=np.uint8)[:, None, None, None]
    answer = asyncio.run(before._predict("digits", "ink", pixels))
    assert [record["label"] for record in answer.records] == list(range(64)) and answer.batch_size == 20
    assert len(sizes) == 4 and max(sizes) < 4 * 2**20  # which is what a gRPC server takes by default


def test_a_replica_whose_model_fails_is_not_healthy(monkeypatch):
    monkeypatch.setattr("pipeline.serving.replica.ray", SimpleNamespace(get=lambda kept: kept))
    replica = ModelReplica([{"m": (trained("mmap", GROUP), ModelOptions())}], WorkerResources(1, 0.0), 4, 0.01)
    asyncio.run(replica.check_health())

    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ClipTowers, "encode_image", fails)
    with pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(replica.check_health())


# What is wrong with a command is said before anything starts


def test_door_faults_end_with_status_2(tmp_path, monkeypatch, capsys):
    for name, prompts in [
        ("mmap", trained("mmap", GROUP)),
        ("other", with_clip(trained("mmap", GROUP), weights="0" * 64)),
    ]:
        save_adapter(tmp_path / f"{name}.safetensors", prompts)
    good = ["--models", f"a={tmp_path}/mmap.safetensors"]
    (port,) = free_ports(1, first=8300)
    with socket.create_server(("127.0.0.1", port)):
        for arguments, message in [
            (["--models", f"{tmp_path}/mmap.safetensors"], "expected NAME=SOURCE"),
            (["--models", "a/b=x"], "expected NAME=SOURCE, with a name of letters"),
            (["--models", "a="], "expected NAME=SOURCE"),
            (["--models", f"a={tmp_path}/absent.safetensors"], "does not exist"),
            ([*good, good[1]], "duplicate name 'a'"),
            ([*good, f"b={tmp_path}/other.safetensors"], "'a' and 'b' cannot share a CLIP: their weights"),
            ([*good, "--clip.pretrained", "/nowhere/clip.pt"], "clip.pretrained=/nowhere/clip.pt: no such file"),
            ([*good, "--port", str(port)], f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use"),
            ([*good, "--host", "192.0.2.77"], "cannot listen on --host 192.0.2.77"),
            ([*good, "--host", "no.such.host.invalid"], "cannot listen on --host no.such.host.invalid"),
            ([*good, "--port", "0"], "port=0: Input should be greater than or equal to 1"),
            ([*good, "--replicas", "0"], "replicas=0: Input should be greater than or equal to 1"),
            (
                [*good, "--cluster.gpus_per_worker", "-1"],
                "cluster.gpus_per_worker=-1: Input should be greater than",
            ),
            ([*good, "--max_request_mib", "nan"], "max_request_mib='nan': Input should be"),
            ([*good, "--timeout_s", "inf"], "timeout_s='inf': Input should be a finite number"),
            ([*good, "--batch_wait_ms", "-1"], "batch_wait_ms=-1: Input should be greater than or equal to 0"),
        ]:
            monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
            with pytest.raises(SystemExit) as end:
                serve.main()
            assert end.value.code == 2, arguments
            assert message in capsys.readouterr().err, arguments


# The service itself


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for name in ("a", "c", "f"):
        method, groups = MIXED[name]
        found[name] = folder / f"{name}.safetensors"
        save_adapter(found[name], trained(method, *groups))
    return found


@pytest.fixture(scope="module")
def service(places, tmp_path_factory):
    (port,) = free_ports(1, first=8400)
    models = ["--models", *(f"{name}={place}" for name, place in places.items())]
    limits = ["--max_request_mib", "6", "--max_images", "8", "--batch_wait_ms", "20"]
    running = Service(tmp_path_factory.mktemp("service"), port, *models, "--replicas", "2", *limits)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(folder)
    return [path.read_bytes() for path in sorted((folder / "ink").rglob("*.png"))[::6]]


def sent(url: str, body: bytes | None = None, kind: str = "image/png"):
    """(status, JSON)."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind} if body is not None else {})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_the_service_answers_as_pipeline_load_does(service, places, images):
    broken = b"no image"
    for name, place in places.items():
        model = pipeline.load(place)
        for task in (model.tasks[0], model.tasks[-1], None):
            query = f"?task={task}" if task else ""
            expected = model.predict([*images[:3], broken], task)
            body = {"images": [base64.b64encode(image).decode() for image in (*images[:3], broken)]}
            status, told = sent(
                f"{service.url}/models/{name}/predict{query}", json.dumps(body).encode(), "application/json"
            )
            assert status == 200
            for found, prediction in zip(told["predictions"], expected, strict=True):
                record = prediction.record()
                for field in ("task", "label", "error"):
                    assert found[field] == record[field]
                assert found["probability"] == pytest.approx(record["probability"], abs=1e-5)
                assert found["probabilities"] == pytest.approx(record["probabilities"], abs=1e-5)
                labels = [guess["label"] for guess in found["predictions_by_task"]]
                assert labels == [guess["label"] for guess in record["predictions_by_task"]]
            status, alone = sent(f"{service.url}/models/{name}/predict{query}", images[0])
            assert status == 200 and alone["label"] == told["predictions"][0]["label"]


@pytest.mark.slow
def test_models_and_health_are_told(service, places):
    assert sent(f"{service.url}/health") == (200, {"status": "ready"})
    status, told = sent(f"{service.url}/models")
    assert status == 200 and list(told["models"]) == list(places)
    prompts = load_adapter(places["a"])
    assert told["models"]["a"] == {
        "method": "MmAP",
        "clip": BUILTIN_DIGITS,
        "weights": prompts.weights,
        "image_size": 32,
        "tasks": prompts.class_names,
        "threshold": None,
        "temperatures": {},
    }


@pytest.mark.slow
def test_limits_and_faults_reach_the_client_through_serve(service, images):
    predict = f"{service.url}/models/a/predict"
    assert sent(f"{service.url}/nothing")[0] == 404
    assert sent(f"{predict}?task=oil", images[0])[0] == 422
    assert sent(predict, b"no image")[0] == 422
    assert sent(predict, images[0], "text/plain")[0] == 415
    assert sent(predict, json.dumps({"images": ["/w"] * 9}).encode(), "application/json")[0] == 413
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /models/a/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
    for rest, goes_on in [
        ("Content-Length: 99999999999\r\n\r\n", False),  # and nothing comes: the answer does not wait for it
        ("Transfer-Encoding: chunked\r\n\r\n", True),  # without end
        ("Content-Length: nonsense\r\n\r\n", False),
    ]:
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall((head + rest).encode())
            stop = threading.Event()

            def send_on(connection=connection, stop=stop):
                chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
                try:
                    while not stop.is_set():
                        connection.sendall(chunk)
                except OSError:
                    pass  # it was cut off

            if goes_on:
                threading.Thread(target=send_on, daemon=True).start()
            answer = connection.recv(1000).decode()
            stop.set()
        assert answer.startswith("HTTP/1.1 400" if "nonsense" in rest else "HTTP/1.1 413"), answer
    large = io.BytesIO()  # more than Serve's gRPC takes in one message
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), dtype=np.uint8)).save(large, "PNG")
    assert large.tell() > 5_000_000 and sent(predict, large.getvalue())[0] == 200
    assert sent(predict, images[0])[0] == 200


@pytest.mark.slow
def test_requests_of_all_models_run_in_batches_and_get_their_own_answers(service, places, images):
    models = {name: pipeline.load(place) for name, place in places.items()}
    requests = [(name, task, at) for at in range(8) for name in models for task in ("ink", None)]

    async def run():
        async with aiohttp.ClientSession() as session:
            urls = [f"{service.url}/models/{n}/predict" + (f"?task={t}" if t else "") for n, t, _ in requests]
            return await asyncio.gather(*(ask(session, url, images[at]) for url, (*_, at) in zip(urls, requests)))

    replies = asyncio.run(run())
    for (name, task, at), reply in zip(requests, replies, strict=True):
        (expected,) = models[name].predict([images[at]], task)
        assert reply.status == 200 and reply.record["label"] == expected.label
        assert reply.record["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert max(reply.batch_size for reply in replies) >= 4


@pytest.mark.fault_injection
def test_a_killed_replica_loses_no_request(service, places, images):
    before = {process.pid for process in service.processes("ModelReplica")}
    assert len(before) == 2
    expected = [prediction.label for prediction in pipeline.load(places["a"]).predict(images, "ink")]

    def kill_one() -> None:
        kill_at_work(psutil.Process(min(before)))

    replies, _ = closed_loop(f"{service.url}/models/a/predict?task=ink", images, 16, 4, kill_one)
    assert len(replies) > 50 and not psutil.pid_exists(min(before))
    assert [(reply.status, reply.record["label"]) for _, reply in replies] == [(200, expected[at]) for at, _ in replies]
    end = time.monotonic() + PATIENCE_S
    while len(service.processes("ModelReplica")) < 2:
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.fault_injection
def test_on_a_cluster_it_is_the_only_service_and_leaves_the_address_free(places, images, tmp_path):
    cluster = RayCluster(tmp_path)
    try:
        port, other = free_ports(2, first=8500)

        def job(place: Path, *more: str) -> tuple[int, str]:
            job = [sys.executable, "jobs/serve.py", "--cluster.address", cluster.gcs, "--port", str(other)]
            env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            job += ["--models", f"m={place}", *more]
            finished = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, env=env, timeout=600)
            return finished.returncode, finished.stderr

        service = Service(tmp_path, port, "--cluster.address", cluster.gcs, "--models", f"a={places['a']}")
        try:
            expected = pipeline.load(places["a"]).predict(images[:1], "ink")[0].label
            assert sent(f"{service.url}/models/a/predict?task=ink", images[0])[1]["label"] == expected
            status, told = job(places["a"])
            assert status == 2 and "(applications: mmap-clip-models, mmap-clip-ingress)" in told
            assert service.end() == 0
        finally:
            service.kill()
        with socket.create_server(("127.0.0.1", port)):
            pass
        status, told = job(places["a"], "--replicas", "3")
        assert (
            status == 2 and "--replicas 3 of 1 CPU each do not fit: the cluster has" in told and "enough for 2" in told
        )
        config = SMALL.model_copy(update={"mmap": MmapConfig(prompt_length=4, source_rows=4)})
        towers = load_clip(SMALL.clip)
        states = (build_method("mmap", towers, GROUP, config).state_dict(),)
        misfit = TrainedAdapter("mmap", SMALL, weights_fingerprint(towers), (GROUP,), states)
        save_adapter(tmp_path / "misfit.safetensors", misfit)
        status, told = job(tmp_path / "misfit.safetensors")
        assert status == 2 and "a replica failed to start: the adapter of ink, neon does not fit MmAP" in told
    finally:
        cluster.stop()


@pytest.mark.slow
def test_the_service_ends_with_what_it_has_answered_and_leaves_no_process(service, images):
    async def run():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            url = f"{service.url}/models/a/predict"
            waiting = [asyncio.create_task(ask(session, url, images[at % len(images)])) for at in range(60)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            ended = asyncio.create_task(asyncio.to_thread(service.end))
            return [(await reply).status for reply in waiting], await ended

    statuses, status = asyncio.run(run())
    assert statuses == [200] * 60 and status == 0, service.log.read_text()
    assert "Traceback" not in service.log.read_text()
