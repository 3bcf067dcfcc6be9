"""The HTTP API without Ray: responses to all requests, limits of a request and of a client, fairness, tokens, metrics,
OpenAPI."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import PNG, SERVED, api, blank_png, get_response, json_request, make_limits, send

from pipeline.data.images import MAX_PIXELS, evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.prediction.image_prediction import COLUMNS
from pipeline.serving.fair_pool import SMALL_COST, FairPool
from pipeline.serving.fair_queue import MAX_CLIENTS, FairQueue
from pipeline.serving.http_api import Answer, NoReplicaError
from pipeline.serving.openapi import openapi
from pipeline.serving.options import parse_models
from pipeline.serving.tokens import find_token, read_token_digests


def test_images_are_preprocessed_as_the_models_need():
    served_pixels, preprocessing = [], Preprocessing(32, "squash", "bilinear")

    async def predict(client: str, model: str, task: str | None, pixels: np.ndarray) -> Answer:
        served_pixels.append(pixels)
        return Answer([{"error": None}] * len(pixels), len(pixels))

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(stream, "PNG")
    get_response(api(predict, preprocessing, max_request_bytes=2**20), body=stream.getvalue())
    assert np.array_equal(served_pixels[0][0], evaluation_pixels(stream.getvalue(), preprocessing))


def test_error_responses_say_what_to_do():
    image = base64.b64encode(PNG).decode()
    for arguments, status, message in [
        ({"path": "/"}, 404, "unknown path; the endpoints are GET /health, GET /models, POST /models/<model>/predict"),
        ({"path": "/models/digits/predict/"}, 404, "unknown path"),
        ({"path": "/models/letters/predict"}, 404, "unknown model 'letters'; the models are digits"),
        ({"method": "GET"}, 405, "method GET not allowed"),
        ({"path": "/health"}, 405, "method POST not allowed"),
        (
            {"content_type": "application/x-www-form-urlencoded"},
            415,
            "an image as image/*, or several as application/json",
        ),
        ({"content_type": None}, 415, "unsupported Content-Type ''"),
        ({"query": b"task=oil"}, 422, "unknown task 'oil'; model 'digits' has the tasks ink, neon"),
        ({"query": b"tsk=ink"}, 422, "unknown query parameter 'tsk'; the only one is task"),
        ({"query": b"task=ink&task=neon"}, 422, "task is given more than once"),
        ({"query": b"task=%00%1b[31m%ff"}, 422, "\\x00\\x1b[31m"),
        ({"body": b""}, 422, "no bytes"),
        ({"body": PNG[:40]}, 422, "supported format"),
        ({"body": b"not an image"}, 422, "not an image of a supported format"),
        ({"body": bytes(2001)}, 413, "exceeds 2,000 bytes"),
        ({"body": b"{", "content_type": "application/json"}, 400, "the body is not valid JSON"),
        ({"body": b"[" * 1900, "content_type": "application/json"}, 400, "the body is not valid JSON"),
        ({"body": b"\xff\xfe\x00", "content_type": "application/json"}, 400, "the body is not valid JSON"),
        (json_request(images=image), 422, "images must be a list of base64 strings"),
        (json_request(images=[]), 422, "images must be a list"),
        (json_request(), 422, "images must be a list"),
        (json_request(image=[image]), 422, "unknown key 'image'; did you mean images?"),
        (json_request(images=[image], top_k=3), 422, "unknown key 'top_k'."),
        (
            {**json_request(), "body": b'{"images": ["' + image.encode() + b'"], "task": "ink", "task": "neon"}'},
            400,
            "twice",
        ),
        ({"body": b"--x", "content_type": "multipart/form-data; boundary=x"}, 415, "several as application/json"),
        (json_request(images=[image], task=["ink"]), 422, "task must be a string"),
        (json_request(images=[image], task=""), 422, "unknown task ''"),
        ({"query": b"task="}, 422, "unknown task ''"),
        (json_request(images=[image], task=3), 422, "task must be a string"),
        (json_request(images=[image] * 4), 413, "4 images exceed the limit of 3"),
        (json_request(images=[image], task="oil"), 422, "unknown task 'oil'"),
        (
            {**json_request(images=[image], task="ink"), "query": b"task=neon"},
            422,
            "task is 'ink' in the body but 'neon' in",
        ),
    ]:
        found_status, content, headers, _ = get_response(api(), **arguments)
        assert found_status == status and message in content["error"], (arguments, found_status, content)
        assert (found_status == 405) == ("allow" in headers)


def test_answers_have_the_fields_of_mlflow_and_broken_images_their_error():
    status, record, headers, _ = get_response(api(), query=b"task=ink")
    assert status == 200 and record["label"] == "zero" and headers["x-batch-size"] == "1"
    assert list(record) == [*COLUMNS, "probabilities", "predictions_by_task"]
    valid, broken = base64.b64encode(PNG).decode(), base64.b64encode(b"no image").decode()
    status, content, headers, _ = get_response(api(), **json_request(images=[broken, valid, "no base64!"], task="ink"))
    assert status == 200 and headers["x-batch-size"] == "1"
    broken_record, valid_record, invalid_record = content["predictions"]
    assert valid_record == record and "supported format" in broken_record["error"]
    assert invalid_record["error"].startswith("not base64")
    assert list(broken_record) == list(record) and broken_record["label"] is None and broken_record["task"] == "ink"
    mixed = [f"data:image/png;base64,{valid.rstrip('=')}", None, 3, "photos/a.png", "file:///etc/passwd"]
    status, content, _, _ = get_response(api(max_images=5), **json_request(images=mixed))
    errors = [record["error"] for record in content["predictions"]]
    assert status == 200 and errors[:2] == [None, "no image but null; expected base64 text"] and all(errors[1:])
    assert "a service reads no files or addresses" in errors[3] and "a service reads no addresses" in errors[4]
    status, content, _, _ = get_response(api(), **json_request(images=[broken]))  # the model is not called
    assert status == 200 and content["predictions"][0]["error"]


def test_too_large_a_body_is_not_read_to_its_end():
    status, _, _, num_read = get_response(api(), headers=[(b"content-length", b"2001")], body=[b"x"] * 9)
    assert (status, num_read) == (413, 0)
    status, _, _, num_read = get_response(api(), body=[bytes(700)] * 100)
    assert (status, num_read) == (413, 3)
    status, _, _, num_read = get_response(api(), body=[PNG[:30], b"", PNG[30:]])
    assert (status, num_read) == (200, 3)


def test_too_many_requests_get_503_before_they_are_read():
    async def run():
        release = asyncio.Event()

        async def slow(client, model, task, pixels):
            await release.wait()
            return Answer([{"error": None}], 1)

        served = api(slow)
        in_flight = [asyncio.create_task(send(served)) for _ in range(2)]
        await asyncio.sleep(0.2)
        status, content, headers, num_read = await send(served)
        assert (status, headers["retry-after"], num_read) == (503, "1", 0)
        assert "2 requests are in flight" in content["error"]
        release.set()
        assert [(await task)[0] for task in in_flight] == [200, 200]
        assert (await send(served))[0] == 200  # the slots are free again

    asyncio.run(run())


def test_timeouts_and_unavailable_replicas():
    async def never(client, model, task, pixels):
        await asyncio.Event().wait()

    async def unavailable(client, model, task, pixels):
        raise NoReplicaError("ActorDiedError")

    status, content, _, _ = get_response(api(never, timeout_s=0.2))
    assert status == 504 and "timeout after 0.2 s" in content["error"]
    status, content, headers, _ = get_response(api(unavailable))
    assert status == 503 and "ActorDiedError" in content["error"] and headers["retry-after"] == "1"
    assert get_response(api(), path="/health", method="GET")[:2] == (200, {"status": "ready"})
    assert get_response(api(ready=False), path="/health", method="GET")[0] == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FUZZED = api(max_request_bytes=10_000)
ALMOST = st.fixed_dictionaries({}, optional={"images": JSON, "task": JSON, "more": JSON})


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300) | (JSON | ALMOST).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["application/json", "image/png", "application/octet-stream"]) | st.text(max_size=20),
    st.binary(max_size=40),
    st.text(max_size=20).map("/models/digits/{}".format) | st.just("/models/digits/predict") | st.text(max_size=20),
)
def test_invalid_requests_get_a_client_error(body, content_type, query, path):
    content_type = content_type.encode("latin-1", "replace").decode("latin-1")
    status, content, _, _ = get_response(FUZZED, path, body, content_type, query)
    assert 400 <= status < 500 or (status == 200 and content["predictions"][0]["error"]), (status, content)


# Attacks of one client


def base64_images(image: bytes, count: int) -> dict:
    return json_request(images=[base64.b64encode(image).decode()] * count)


ATTACKER = "198.51.100.7"


def test_bodies_that_do_not_arrive_keep_nobody_out():
    """256 connections that send one byte each, at small size."""

    async def run():
        served = api(max_waiting=4, max_client_share=0.5, upload_timeout_s=60)
        slow = [
            asyncio.create_task(send(served, body=[b"x", b"y"], pause_s=3600, client=f"198.51.100.{number % 4}"))
            for number in range(12)  # more than the four addresses may have, and than may arrive at once
        ]
        await asyncio.sleep(0.05)
        for _ in range(6):
            assert (await asyncio.wait_for(send(served), 5))[0] == 200
        ended = [task.result() for task in slow if task.done()]
        assert {status for status, *_ in ended} <= {429, 503} and len(ended) >= 8
        assert all("retry-after" in headers for _, _, headers, _ in ended)
        shed = [content["error"] for status, content, *_ in ended if status == 503]
        assert shed and all("oldest of their sender" in error for error in shed)
        for task in slow:
            task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("body", [[b"x", b"y"], [b"x"] * 1000], ids=["stops", "one byte at a time"])
def test_a_slow_body_is_ended_and_its_connection_closed(body):
    start = time.monotonic()
    pause_s = 3600 if len(body) == 2 else 0.02
    status, content, headers, _ = get_response(api(upload_timeout_s=0.1), body=body, pause_s=pause_s)
    assert status == 408 and "did not arrive within 0.1 s" in content["error"] and headers["connection"] == "close"
    assert time.monotonic() - start < 4  # which is less than the timeout of the request


def test_a_client_has_a_share_of_the_requests_and_of_the_memory():
    async def run():
        release = asyncio.Event()

        async def slow(client, model, task, pixels):
            await release.wait()
            return Answer([{"error": None}] * len(pixels), 1)

        served = api(slow, max_waiting=4, max_client_share=0.5)
        waiting = [asyncio.create_task(send(served, client=ATTACKER)) for _ in range(2)]
        await asyncio.sleep(0.1)
        status, content, headers, num_read = await send(served, client=ATTACKER)
        assert (status, headers["retry-after"], num_read) == (429, "1", 0) and "2 requests" in content["error"]
        waiting.append(asyncio.create_task(send(served)))
        await asyncio.sleep(0.1)
        release.set()
        assert [(await task)[0] for task in waiting] == [200] * 3
        # Networks of 64 bits are one client, as each of their addresses costs nothing.
        release.clear()
        waiting = [asyncio.create_task(send(served, client=f"2001:db8::{number}")) for number in range(2)]
        await asyncio.sleep(0.1)
        assert (await send(served, client="2001:db8::ffff:1"))[0] == 429
        release.set()
        assert [(await task)[0] for task in waiting] == [200] * 2
        # Bytes: of three images of 32 x 32 a client may hold the pixels of two.
        release.clear()
        served = api(slow, max_buffered_bytes=2 * 2 * 3 * 32**2, max_client_share=0.5, max_waiting=100)
        waiting = [asyncio.create_task(send(served, client=ATTACKER))]
        await asyncio.sleep(0.1)
        status, content, _, _ = await send(served, client=ATTACKER, **base64_images(PNG, 3))
        assert status == 429 and "hold more than" in content["error"]
        release.set()
        assert (await send(served))[0] == 200 and (await waiting[0])[0] == 200

    asyncio.run(run())


def test_too_many_pixels_are_refused_before_any_is_decoded(monkeypatch):
    """64 PNGs of 88 megapixels in 8 MiB, at small size."""
    decoded = []
    monkeypatch.setattr("pipeline.serving.http_api.evaluation_pixels", lambda *a: decoded.append(a) or np.zeros(1))
    request = base64_images(blank_png(1000, 800), 3)
    status, content, _, _ = get_response(api(max_pixels=2_000_000, max_request_bytes=10**5), **request)
    assert status == 413 and "2 megapixels in all" in content["error"] and not decoded
    stream = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(stream, "JPEG", progressive=True)
    scans = stream.getvalue().replace(b"\xff\xd9", b"") + b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" * 60
    status, content, _, _ = get_response(
        api(max_pixels=2_000_000, max_request_bytes=10**5), body=scans, content_type="image/jpeg"
    )
    assert status == 413 and not decoded  # each scan is a pass over all pixels


@pytest.mark.parametrize("num_threads, cost", [(2, MAX_PIXELS // 3), (4, MAX_PIXELS)], ids=["threads", "memory"])
def test_small_images_do_not_wait_for_large_ones_and_clients_take_turns(num_threads, cost):
    """Of large images one is decoded at a time: a thread is left for small ones, or the memory is used up."""

    async def run():
        pool, release, done = FairPool(num_threads), threading.Event(), []

        async def decode(client: str, cost: int, name: str, wait: bool = False) -> None:
            await pool.run(client, cost, lambda: release.wait(30) if wait else None)
            done.append(name)

        large = [asyncio.create_task(decode("a", cost, f"large {i}", wait=True)) for i in range(3)]
        await asyncio.sleep(0)
        await asyncio.wait_for(decode("b", 1000, "small"), 20)
        assert done == ["small"]
        large[1].cancel()  # leaves the queue
        await asyncio.sleep(0)
        assert pool.num_queued() == 1
        release.set()
        await asyncio.wait_for(asyncio.gather(large[0], large[2]), 20)
        assert done == ["small", "large 0", "large 2"]
        # A client with a backlog of small images, then another one.
        done.clear()
        await asyncio.gather(
            *(decode("a", SMALL_COST, f"a{i}") for i in range(20)), *(decode("b", 1000, f"b{i}") for i in range(3))
        )
        assert max(done.index(f"b{i}") for i in range(3)) < 10

    asyncio.run(run())


def test_a_failed_decoding_reaches_its_caller_and_frees_its_thread():
    def fails():
        raise ZeroDivisionError

    async def run():
        pool = FairPool(1)
        for cost in (1, MAX_PIXELS):
            with pytest.raises(ZeroDivisionError):
                await pool.run("a", cost, fails)
        assert await pool.run("a", MAX_PIXELS, lambda: 7) == 7

    asyncio.run(run())


def test_a_fair_queue_gives_equal_shares_and_forgets_clients():
    queue = FairQueue[str]()
    for number in range(6):
        queue.push("heavy", 10, f"heavy {number}")
    for number in range(3):
        queue.push("light", 1, f"light {number}")
    assert [queue.pop() for _ in range(5)] == ["heavy 0", "light 0", "light 1", "light 2", "heavy 1"]
    queue.push("new", 10, "new")  # does not catch up on what it did not ask for before
    assert [queue.pop() for _ in range(3)] == ["new", "heavy 2", "heavy 3"]
    for number in range(2 * MAX_CLIENTS):
        queue.push(f"client {number}", 1, "x")
        queue.pop()
    assert len(queue._finish_tags) <= MAX_CLIENTS


# Requests that are none


def test_compressed_bodies_and_other_protocols_are_refused():
    for encoding in (b"gzip", b"br", b"GZIP, identity"):
        status, content, headers, num_read = get_response(api(), headers=[(b"content-encoding", encoding)])
        assert (status, num_read) == (415, 0) and "without compression" in content["error"]
    assert get_response(api(), headers=[(b"content-encoding", b"identity")])[0] == 200
    for method in ("OPTIONS", "HEAD", "PUT", "DELETE", "TRACE"):
        status, _, headers, num_read = get_response(api(), method=method)
        assert (status, headers["allow"], num_read) == (405, "POST", 0)
    sent = []

    async def upgrade():
        async def collect(message):
            sent.append(message)

        await api()({"type": "websocket", "path": "/models/digits/predict", "headers": []}, None, collect)

    asyncio.run(upgrade())
    assert [message["type"] for message in sent] == ["websocket.close"]
    long_name = "x" * 10**6
    assert len(get_response(api(), f"/models/{long_name}/predict")[1]["error"]) < 300
    assert len(get_response(api(), query=b"task=" + long_name.encode())[1]["error"]) < 300


def test_an_unexpected_error_tells_nothing_of_the_server(caplog):
    async def fails(client, model, task, pixels):
        raise RuntimeError("/srv/models/secret.safetensors: CUDA error")

    status, content, _, _ = get_response(api(fails))
    assert status == 500 and content == {"error": "the model failed; see the log of the service"}
    assert "/srv/models/secret.safetensors" in caplog.text


# Tokens

TOKENS = ("0123456789abcdef" * 2, "another token of another user".replace(" ", "-"))


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# the first is the old one\n{TOKENS[0]}\n\n{TOKENS[1]}\r\n")
    file.chmod(0o600)
    return file


def test_requests_need_a_token(token_file):
    digests = read_token_digests(str(token_file))
    assert not any(token in repr(digests) for token in TOKENS)
    served = api(tokens=digests)
    for number, token in enumerate(TOKENS):
        for scheme in ("Bearer", "bearer"):
            header = f"{scheme} {token}"
            assert find_token(header, digests) == number
            assert get_response(served, headers=[(b"authorization", header.encode())])[0] == 200
    for header in ("", "Bearer", "Bearer ", f"Basic {TOKENS[0]}", TOKENS[0], f"Bearer {TOKENS[0]}x", "Bearer \xe9" * 9):
        for path in ("/models/digits/predict", "/models", "/metrics", "/openapi.json", "/nothing", "/models/x/predict"):
            headers = [(b"authorization", header.encode("latin-1"))] if header else []
            status, content, response_headers, num_read = get_response(served, path, headers=headers)
            assert (status, num_read) == (401, 0) and response_headers["www-authenticate"].startswith("Bearer")
            assert "Authorization: Bearer" in content["error"] and TOKENS[0] not in str(content)
    assert get_response(served, "/health", method="GET")[0] == 200


def test_unusable_token_files_are_refused(tmp_path, token_file):
    for content, mode, message in [
        ("", 0o600, "has no token"),
        ("# only a comment\n", 0o600, "has no token"),
        ("short\n", 0o600, "token 1 must have at least 16"),
        (f"{TOKENS[0]}\npass word of many letters", 0o600, "token 2 must have"),
        (f"{TOKENS[0]}\n{TOKENS[0]}\n", 0o600, "twice"),
        (TOKENS[0] + "\u00e9", 0o600, "ASCII"),
        (TOKENS[0], 0o644, "chmod 600"),
        ("x" * 2**17, 0o600, "is not a file of up to"),
    ]:
        token_file.write_text(content)
        token_file.chmod(mode)
        with pytest.raises(UserError, match=message) as error:
            read_token_digests(str(token_file))
        assert not any(token in str(error.value) for token in TOKENS)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="openssl rand"):
            read_token_digests(str(path))
    token_file.chmod(0o640)  # as a Secret that is mounted for a group
    token_file.write_text(TOKENS[0])
    assert len(read_token_digests(str(token_file))) == 1


def test_clients_with_different_tokens_have_shares_of_their_own(token_file):
    async def run():
        clients = set()

        async def predict(client, model, task, pixels):
            clients.add(client)
            return Answer([{"error": None}], 1)

        served = api(predict, tokens=read_token_digests(str(token_file)))
        for token in TOKENS:
            await send(served, headers=[(b"authorization", f"Bearer {token}".encode())])
        assert len(clients) == 2 and not any(token in client for token in TOKENS for client in clients)

    asyncio.run(run())


# Metrics and OpenAPI


def test_metrics_count_requests_images_and_rejections():
    served = api()
    broken = base64.b64encode(b"x").decode()
    get_response(served)
    get_response(served, **json_request(images=[base64.b64encode(PNG).decode()] * 2 + [broken]))
    get_response(served, body=bytes(3000))
    get_response(served, "/models/unknown/predict")
    status, text, headers, _ = get_response(served, "/metrics", method="GET")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    predict = "/models/<model>/predict"
    assert samples["mmap_clip_requests_total", predict, "200", "digits"] == 2
    assert samples["mmap_clip_requests_total", predict, "413", "digits"] == 1
    assert samples["mmap_clip_requests_total", "", predict, "404"] == 1  # names that clients invent are no labels
    assert samples["mmap_clip_rejected_requests_total", "body size"] == 1
    assert samples["mmap_clip_images_total", "digits", "predicted"] == 3
    assert samples["mmap_clip_images_total", "broken", "digits"] == 1
    assert samples["mmap_clip_request_seconds_count", predict, "digits"] == 3
    assert samples["mmap_clip_waiting_requests",] == samples["mmap_clip_arriving_requests",] == 0


def description(**options) -> dict:
    status, content, _, _ = get_response(api(**options), "/openapi.json", method="GET")
    assert status == 200
    return content


def test_openapi_is_valid_and_names_models_and_tasks():
    OpenAPIV31SpecValidator(description()).validate()
    predict = description()["paths"]["/models/{model}/predict"]["post"]
    assert [parameter["schema"]["enum"] for parameter in predict["parameters"]] == [["digits"], ["ink", "neon"]]
    assert "401" not in predict["responses"] and "security" not in description()
    protected = openapi(SERVED, make_limits(), needs_token=True)
    OpenAPIV31SpecValidator(protected).validate()
    predict, health = (protected["paths"][path] for path in ("/models/{model}/predict", "/health"))
    assert protected["security"] and "401" in predict["post"]["responses"] and not health["get"]["security"]


@pytest.mark.parametrize(
    "request_options",
    [
        {},
        {"query": b"task=ink"},
        {"query": b"task=oil"},
        {"body": b"no image"},
        {"body": bytes(3000)},
        {"content_type": "text/plain"},
        {"path": "/models/x/predict"},
        json_request(images=[base64.b64encode(PNG).decode(), "no base64"]),
        json_request(images=[]),
        {"path": "/health", "method": "GET"},
        {"path": "/models", "method": "GET"},
        {"path": "/metrics", "method": "GET"},
    ],
    ids=lambda options: " ".join(map(str, options)) or "image",
)
def test_real_answers_are_as_openapi_says(request_options):
    served = description()
    status, content, headers, _ = get_response(api(), **request_options)
    path = request_options.get("path", "/models/digits/predict")
    path = "/models/{model}/predict" if path.endswith("/predict") else path
    operation = served["paths"][path][request_options.get("method", "POST").lower()]
    media = operation["responses"][str(status)]["content"][headers["content-type"].partition(";")[0]]
    validator = jsonschema.Draft202012Validator({**media["schema"], "components": served["components"]})
    validator.validate(content)
    if isinstance(content, dict):
        assert not validator.is_valid({**content, "unknown": 1})


def test_malformed_models_are_refused():
    for model in ("x", "a/b=x", "a=", "=x"):
        with pytest.raises(UserError, match="expected NAME=SOURCE"):
            parse_models((model,))
