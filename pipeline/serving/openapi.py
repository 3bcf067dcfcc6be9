"""OpenAPI description of the HTTP service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.data.names import LABEL_THRESHOLD

if TYPE_CHECKING:
    from pipeline.serving.admission import Limits
    from pipeline.serving.http_api import ServedModel

Schema = dict[str, Any]
API_VERSION = "1.0"

STATUSES = {
    400: "The body is not valid JSON, or the client disconnected.",
    401: "A valid token is missing.",
    404: "Unknown model or path.",
    405: "The method is not allowed.",
    408: "The body arrived too slowly.",
    413: "The body, the number of images, or their pixels exceed a limit.",
    415: "The Content-Type is neither an image nor JSON, or the body is compressed.",
    422: "An unknown task or key, a single broken image, or JSON of another structure.",
    429: "This client has too many requests in flight.",
    500: "The model failed, which the service's log explains.",
    503: "Too many requests in flight, or no replica could answer.",
    504: "No response within the time limit.",
}
RETRY = (429, 503)


def openapi(models: Mapping[str, ServedModel], limits: Limits, needs_token: bool) -> Schema:
    """Return the OpenAPI 3.1 description of a service with these models."""
    tasks = sorted({task for model in models.values() for task in model.labels})
    task = {"enum": tasks, "description": "Task; without one, the most probable prediction of all tasks."}
    responses = {str(status): _response(status) for status in STATUSES}
    protected = ("401",) if needs_token else ()
    prediction = {
        "200": {
            "description": "The prediction, or, for a JSON request, the predictions in order.",
            "headers": {"X-Batch-Size": {"schema": {"type": "integer"}, "description": "Images in the model's batch."}},
            "content": {"application/json": {"schema": {"anyOf": [_ref("Prediction"), _ref("Predictions")]}}},
        },
        **{status: responses[status] for status in responses if status not in ("401", "405") or status in protected},
    }
    prediction["422"] = {
        "description": STATUSES[422],
        "content": {"application/json": {"schema": {"anyOf": [_ref("Error"), _ref("Prediction")]}}},
    }
    image = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    sent_images = {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.max_images,
        "items": {"type": "string", "contentEncoding": "base64", "description": "An encoded image as base64 text."},
    }
    number, text = {"type": "number"}, {"type": "string"}
    optional_number, optional_text = {"type": ["number", "null"]}, {"type": ["string", "null"]}

    def get(summary: str, schema: Schema | None, *statuses: str, media_type: str = "application/json") -> Schema:
        content = {media_type: {"schema": schema or text}}
        return {
            "summary": summary,
            "responses": {
                "200": {"description": summary, "content": content},
                **{status: responses[status] for status in statuses},
            },
        }

    description: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "mmap-clip: image classification with trained models", "version": API_VERSION},
        "paths": {
            "/health": {"get": {**get("A replica is ready.", _ref("Health"), "503"), "security": []}},
            "/models": {"get": get("The models, with their tasks and classes.", _ref("Models"), *protected)},
            "/models/{model}/predict": {
                "post": {
                    "summary": "Classify an image, or several as JSON.",
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"enum": list(models)}},
                        {"name": "task", "in": "query", "schema": task},
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "image/*": image,
                            "application/octet-stream": image,
                            "application/json": {"schema": _ref("PredictRequest")},
                        },
                    },
                    "responses": prediction,
                }
            },
            "/metrics": {"get": get("Metrics in Prometheus' text format.", None, *protected, media_type="text/plain")},
            "/openapi.json": {"get": get("This description.", {"type": "object"}, *protected)},
        },
        "components": {
            "schemas": {
                "Error": _object({"error": text}),
                "Health": _object({"status": {"const": "ready"}}),
                "Models": _object({"models": {"type": "object", "additionalProperties": _ref("Model")}}),
                "Model": _object(
                    {
                        "method": text,
                        "clip": text,
                        "weights": {**text, "description": "Fingerprint of the CLIP weights."},
                        "image_size": {"type": "integer"},
                        "tasks": {"type": "object", "additionalProperties": {"type": "array", "items": text}},
                        "threshold": optional_number,
                        "temperatures": {"type": "object", "additionalProperties": number},
                        "multi_label": {
                            "type": "boolean",
                            "description": "Whether an image may have several labels: all whose probability reaches "
                            f"the threshold, or {LABEL_THRESHOLD} if it is null.",
                        },
                    }
                ),
                "PredictRequest": {
                    **_object({"images": sent_images, "task": {**task, "enum": [*tasks, None]}}),
                    "required": ["images"],
                },
                "Predictions": _object({"predictions": {"type": "array", "items": _ref("Prediction")}}),
                "Prediction": _object(
                    {
                        "path": {"type": "null"},
                        "task": optional_text,
                        "label": {
                            **optional_text,
                            "description": "null: below the threshold, or broken. Several are separated by `;`.",
                        },
                        "probability": optional_number,
                        "error": {**optional_text, "description": "Why the image is broken."},
                        "probabilities": {"type": "object", "additionalProperties": number},
                        "predictions_by_task": {"type": "array", "items": _ref("TaskPrediction")},
                    }
                ),
                "TaskPrediction": _object({"task": text, "label": optional_text, "probability": number}),
            }
        },
    }
    if needs_token:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return description


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(status: int) -> Schema:
    response: Schema = {
        "description": STATUSES[status],
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    if status in RETRY:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return response
