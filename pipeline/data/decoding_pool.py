"""Pool of threads or processes that decode images; without torch, so that its processes start fast."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np

from pipeline.data.images import BrokenImage, evaluation_pixels
from pipeline.data.preprocessing import Preprocessing

MAX_THREADS = 6
"""Above it, the GIL is the bound: Pillow holds it for a seventh of the time that an image of 500 x 400 pixels takes."""
MIN_IMAGES = 10_000
"""Below it, processes take longer to start, a few seconds, than they save."""


def decoding_pool(workers: int, num_images: int) -> Executor:
    """Return a pool of this many threads, or of processes if threads would wait for the GIL for long."""
    if workers <= MAX_THREADS or num_images < MIN_IMAGES:
        return ThreadPoolExecutor(workers, "decode")
    context = get_context("forkserver")  # a fork of this process would copy locks that its other threads hold
    context.set_forkserver_preload(["__main__", __name__])  # imported once; the first by Python 3.12.8 or newer
    return ProcessPoolExecutor(workers, context, _exit_with_parent)


def decode_images(images: Sequence[bytes], preprocessing: Preprocessing) -> list[np.ndarray | BrokenImage]:
    """Return `evaluation_pixels` of each image, or its error."""
    return [_decode(image, preprocessing) for image in images]


def _decode(image: bytes, preprocessing: Preprocessing) -> np.ndarray | BrokenImage:
    try:
        return evaluation_pixels(image, preprocessing)
    except BrokenImage as error:
        return error


def _exit_with_parent() -> None:
    """End this process with its parent, even if that is killed; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
