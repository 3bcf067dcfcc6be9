"""Options of the HTTP service, on the command line and in a Serve config."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field

from pipeline.config import JobOptions, Precision
from pipeline.cpus import usable_cpus
from pipeline.errors import UserError
from pipeline.serving.admission import Limits

MIB = 2**20


class ServingOptions(JobOptions):
    undivided: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[str, ...] = Field(
        description="NAME=SOURCE of each model: its name in the URLs, and a .safetensors file, a run directory (either "
        "local or s3://), hf-hub:OWNER/NAME, or an MLflow URI (models:/..., runs:/...)."
    )
    token_file: str | None = Field(
        None,
        description="File with a token per line, one of which each request must send as `Authorization: Bearer TOKEN`, "
        "except GET /health; null: no token.",
    )
    max_request_mib: float = Field(10, gt=0, lt=4096, description="Maximum size of a request body in MiB.")
    max_images: int = Field(64, ge=1, description="Maximum number of images per request.")
    max_megapixels: float = Field(
        256, gt=0, description="Maximum number of megapixels of all images of a request together."
    )
    max_waiting: int = Field(
        256, ge=1, description="Maximum in-flight requests per ingress; more get 503 with Retry-After."
    )
    max_buffered_mib: float = Field(
        1024, gt=0, description="Maximum size of the bodies and pixels of all in-flight requests per ingress in MiB."
    )
    max_client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of max_waiting and max_buffered_mib that one client (an address with a token) may use; more "
        "get 429.",
    )
    upload_timeout_s: float = Field(
        10, gt=0, description="Seconds in which a request body must arrive, plus one for each 32 KiB."
    )
    timeout_s: float = Field(60, gt=0, description="Request timeout in seconds.")
    precision: Precision | None = Field(
        None,
        description="Precision of the towers: float32, bfloat16 or auto (as clip.precision); null: as in training.",
    )
    replicas: int = Field(1, ge=1, description="Number of replicas, each with all models.")
    max_batch: int = Field(64, ge=1, description="Maximum batch size of a replica.")
    batch_wait_ms: float = Field(5, ge=0, description="Batch wait timeout in milliseconds.")
    ingress_replicas: int = Field(1, ge=1, description="Number of ingresses, which decode the images.")

    def limits(self) -> Limits:
        return Limits(
            max_request_bytes=int(self.max_request_mib * MIB),
            max_images=self.max_images,
            max_pixels=int(self.max_megapixels * 1e6),
            max_waiting=self.max_waiting,
            max_buffered_bytes=int(self.max_buffered_mib * MIB),
            max_client_share=self.max_client_share,
            upload_timeout_s=self.upload_timeout_s,
            timeout_s=self.timeout_s,
            decoding_threads=usable_cpus()[0],
        )

    def check(self) -> None:
        """Raises: UserError: an option that contradicts another."""
        if self.max_buffered_mib < self.max_request_mib:
            raise UserError(
                f"--max_buffered_mib {self.max_buffered_mib:g} is less than --max_request_mib "
                f"{self.max_request_mib:g}: raise it, or lower the other"
            )


class ApplicationOptions(ServingOptions):
    """Arguments of `pipeline.serving.service:build_application` in a Serve config."""

    pretrained: str | None = Field(None, description="CLIP weights; null: as in training.")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores per replica; without GPUs also its threads.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs per replica.")


def parse_models(models: tuple[str, ...]) -> dict[str, str]:
    """Parse NAME=SOURCE of each model; UserError if one is malformed or a name occurs twice."""
    sources: dict[str, str] = {}
    for model in models:
        name, _, source = model.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name) or not source:
            raise UserError(f"--models {model}: expected NAME=SOURCE, with a name of letters, digits, `_`, `.`, `-`")
        if name in sources:
            raise UserError(f"--models {model}: duplicate name {name!r}")
        sources[name] = source
    return sources
