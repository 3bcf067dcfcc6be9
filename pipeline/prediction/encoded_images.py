"""Images as base64 text and behind URLs; without torch.

Only the user's own process reads URLs (`TrainedModel.predict`, `mmap-clip predict`), with the user's rights, so that
private addresses are allowed. Services take bytes and base64 text: a request never names a file or an address.
"""

from __future__ import annotations

import base64
import http.client
import re
import time
import urllib.request
from functools import lru_cache
from numbers import Real
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote

from pipeline.data.images import MAX_PIXELS, BrokenImage, open_image

MAX_URL_BYTES = 64 * 2**20
MAX_REDIRECTS = 5
CONNECTION_TIMEOUT_S = 20
"""For the connection, and for each read."""
DOWNLOAD_TIMEOUT_S = 120
"""For the whole image."""
SCANS_PER_PASS = 10
"""A progressive JPEG with this many scans more takes about as long as one more image without."""
_READ_BYTES = 2**16


def is_url(name: str) -> bool:
    return re.match(r"https?://", name, re.IGNORECASE) is not None


def is_data_url(name: str) -> bool:
    return name[:5].lower() == "data:"


def decode_base64(text: str) -> bytes:
    """Decode base64, standard or URL-safe, with or without padding and line breaks, plain or in a data URL.

    Raises:
        BrokenImage: not base64.
    """
    if is_data_url(text):
        header, _, text = text.partition(",")
        if not header.lower().endswith(";base64"):
            raise BrokenImage("a data URL that is not base64; expected data:image/png;base64,...")
        text = unquote(text)
    digits = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise BrokenImage(f"not base64: {error}") from None


def decode_sent_image(value: object) -> bytes:
    """Return the bytes of an image in a request to a service: base64 text, or bytes.

    Raises:
        BrokenImage: anything else, such as a path or URL.
    """
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        kind = "null" if is_missing(value) else type(value).__name__
        raise BrokenImage(f"no image but {kind}; expected base64 text")
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        raise BrokenImage("a service reads no addresses: send the image itself as base64 text")
    try:
        return decode_base64(value)
    except BrokenImage as error:
        raise BrokenImage(f"{error}; a service reads no files or addresses: send the image itself") from None


def num_pixels_to_decode(data: bytes) -> int:
    """Return the number of pixels of an encoded image, times the passes over them that the scans of a progressive JPEG
    take; 0 if it is not decoded, as it is broken or too large. Reads the image only as far as its size."""
    try:
        with open_image(data) as image:
            num_pixels = image.width * image.height
            num_scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    except Exception:  # Pillow's decoders raise almost anything on bad bytes
        return 0
    return 0 if num_pixels > MAX_PIXELS else num_pixels * (1 + num_scans // SCANS_PER_PASS)


def is_missing(value: object) -> bool:
    """Return whether a cell of a table is empty: None, NaN, or pandas' NA or NaT."""
    is_nan = isinstance(value, Real) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def read_url(url: str) -> bytes:
    """Download an image from an http or https URL.

    Raises:
        BrokenImage: an error of the server or the connection, a web page, more than MAX_URL_BYTES, too slow.
    """
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    try:
        request = urllib.request.Request(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers={"User-Agent": "mmap-clip"})
        with _opener().open(request, timeout=CONNECTION_TIMEOUT_S) as response:
            if (content_type := response.headers.get_content_type()) == "text/html":
                raise BrokenImage(f"a web page ({content_type}), no image; give the address of the image itself")
            data = bytearray()
            while chunk := response.read1(_READ_BYTES):
                data += chunk
                if len(data) > MAX_URL_BYTES:
                    raise BrokenImage(f"more than {MAX_URL_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise BrokenImage(f"not downloaded within {DOWNLOAD_TIMEOUT_S} s")
            return bytes(data)
    except BrokenImage:
        raise
    except HTTPError as error:
        raise BrokenImage(f"HTTP status {error.code} ({error.reason})") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise BrokenImage(f"cannot be downloaded: {reason or type(error).__name__}") from None


class _FewRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS


@lru_cache
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener without urllib's handlers of other schemes, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _FewRedirects(),
    ):
        opener.add_handler(handler)
    return opener
