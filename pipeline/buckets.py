"""Buckets (s3://, gs://, ...) through pyarrow's file systems: opening, retries, and paths to read from."""

from __future__ import annotations

import io
import logging
import math
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, quote

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_DELAYS_S = (1, 2, 4, 8, 15, 30, 30, 30)
"""Delays between attempts to reach a bucket during a run."""
_SAFE_IN_URI = ":/@%!$&'()*+,;="
"""What `quote` leaves as it is in the URI of a bucket; `#` and spaces belong to a folder's name."""
_CREDENTIALS = re.compile(r"[^:/?]+://[^/?:]*:(?!\d+([/?]|$))[^?]*@")
"""A user and a password, which may contain slashes; a number after the colon is a port."""
_ANONYMOUS = re.compile(r"[?&]anonymous=(true|1)(?=&|$)", re.IGNORECASE)
_REFUSALS = (
    *("ACCESS_DENIED", "PERMISSION_DENIED", "UNAUTHENTICATED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID"),
    *("SIGNATURE_DOES_NOT_MATCH", "HTTP status 400", "HTTP status 401", "HTTP status 403", "ExpiredToken"),
)
"""Parts of errors that another attempt cannot change."""
SAME_OUTAGE_S = 60
_last_warning: dict[tuple[str, float], float] = {}
"""Name of a bucket and delay → time of the last warning of it: one line for all threads that wait."""
ACCESS_ADVICE = (
    "Check the name of the bucket, AWS_ENDPOINT_URL (or ?endpoint_override=), and the credentials in the environment"
)


@lru_cache
def open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return pyarrow's file system, and the base path in it.

    Raises:
        UserError: pyarrow cannot open the URI, or it holds a password.
    """
    _refuse_credentials(uri)
    path, _, options = uri.partition("?")
    is_anonymous, options = bool(_ANONYMOUS.search(f"?{options}")), _ANONYMOUS.sub("", f"?{options}").lstrip("?&")
    try:
        if is_anonymous and path.startswith("s3://"):
            base, values = path.removeprefix("s3://").rstrip("/"), dict[str, Any](parse_qsl(options))
            if not values.keys() & {"region", "endpoint_override"}:
                values["region"] = pafs.resolve_s3_region(base.partition("/")[0])
            return pafs.S3FileSystem(anonymous=True, **values), base
        if is_anonymous and path.startswith("gs://"):
            path = path.replace("gs://", "gs://anonymous@", 1)
        filesystem, base = pafs.FileSystem.from_uri(quote(path, safe=_SAFE_IN_URI) + (f"?{options}" if options else ""))
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{uri} is not a storage URI that pyarrow can open (s3://bucket/folder): {error}") from None
    return filesystem, base.rstrip("/")


def _refuse_credentials(uri: str) -> None:
    if _CREDENTIALS.match(uri):
        raise UserError(
            "a URI must not contain credentials, since it is logged: set them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )


def is_refusal(error: OSError) -> bool:
    """Return whether another attempt would give the same error: a missing file, or no permission."""
    return isinstance(error, FileNotFoundError | PermissionError) or any(text in str(error) for text in _REFUSALS)


def with_retries(action: Callable[[], T], name: str, is_final: Callable[[OSError], bool] = lambda error: False) -> T:
    """Return the value of `action`; retry for two minutes while a bucket is unreachable.

    Args:
        name: how messages call the bucket.
        is_final: whether to raise an error at once.

    Raises:
        UserError: it still is.
    """
    delays = iter(RETRY_DELAYS_S)
    while True:
        try:
            return action()
        except OSError as error:
            if is_final(error):
                raise
            if (delay := next(delays, None)) is None:
                raise UserError(f"{name} cannot be reached: {error}. Rerun the same command to resume") from error
            if time.monotonic() - _last_warning.get((name, delay), -math.inf) > SAME_OUTAGE_S:
                _last_warning[name, delay] = time.monotonic()
                log.warning("%s: %s; retrying in %d s", name, error, delay)
            time.sleep(delay)


class BucketFile(NamedTuple):
    """Size and times of a file, named as in os.stat_result; a bucket has no time of change."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_ctime_ns(self) -> int:
        return self.st_mtime_ns


class BucketEntry(NamedTuple):
    """An entry of a folder, as os.DirEntry; a bucket has no links."""

    name: str
    path: BucketPath
    file: BucketFile | None

    def is_dir(self) -> bool:
        return self.file is None

    def is_symlink(self) -> bool:
        return False


_Listing = dict[str, BucketFile | None]
"""Name → its file; None: a folder."""


class BucketPath:
    """Path in a bucket, with the methods of pathlib.Path that reading a data set needs.

    Listings are kept, and shared by all paths that are made of each other, so that a file that a listing has costs no
    request of its own; a pickled path has none. All methods raise UserError if the bucket cannot be reached for two
    minutes or refuses; reading a file raises OSError if it refuses.
    """

    __slots__ = ("_listings", "_location", "_options")

    def __init__(self, uri: str):
        _refuse_credentials(uri)
        location, _, self._options = uri.partition("?")
        scheme, _, path = location.partition("://")
        self._location = f"{scheme}://{path.strip('/')}"
        self._listings: dict[str, _Listing | None] = {}

    def __str__(self) -> str:
        return self._location + (f"?{self._options}" if self._options else "")

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __getstate__(self) -> tuple[str, str]:
        return self._location, self._options

    def __setstate__(self, state: tuple[str, str]) -> None:
        self._location, self._options = state
        self._listings = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and self.__getstate__() == other.__getstate__()

    def __hash__(self) -> int:
        return hash(self.__getstate__())

    def __lt__(self, other: BucketPath) -> bool:
        return self._location < other._location

    def _at(self, location: str) -> BucketPath:
        path = object.__new__(BucketPath)
        path._location, path._options, path._listings = location, self._options, self._listings
        return path

    @property
    def location(self) -> str:
        """The URI without its options."""
        return self._location

    @property
    def name(self) -> str:
        return self._location.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def anchor(self) -> str:
        """The bucket."""
        scheme, _, path = self._location.partition("://")
        return f"{scheme}://{path.partition('/')[0]}"

    @property
    def parent(self) -> BucketPath:
        return self if self._location == self.anchor else self._at(self._location.rpartition("/")[0])

    @property
    def parents(self) -> list[BucketPath]:
        parents, path = [], self
        while path._location != path.anchor:
            parents.append(path := path.parent)
        return parents

    def absolute(self) -> BucketPath:
        return self

    def joinpath(self, *parts: str) -> BucketPath:
        return self._at("/".join((self._location, *parts)))

    def __truediv__(self, name: str) -> BucketPath:
        """Return the path of `name`, which may be the location of another file in the bucket: `s3://bucket/file`."""
        if name.startswith(f"{self.anchor}/"):
            return self._at(name)
        if name.startswith("../"):
            bucket = self.anchor
            return self._at(bucket + posixpath.normpath(f"{self._location[len(bucket) :]}/{name}"))
        if name in ("", "."):
            return self
        return self._at(f"{self._location}/{name}")

    def with_suffix(self, suffix: str) -> BucketPath:
        return self.parent / (self.stem + suffix)

    # Requests

    def check_access(self, name: str) -> None:
        """Look for the path, called `name`. Raises: UserError: the bucket cannot be reached, or refuses."""
        try:
            filesystem, key = self._open()
            if filesystem.get_file_info(key).type != pafs.FileType.File:
                listing = self._listings[key] = self._list(filesystem, key)
                bucket = key.partition("/")[0]
                if not listing and filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise FileNotFoundError(2, f"there is no bucket {bucket}")
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{name} cannot be read: {error}. {ACCESS_ADVICE}; a public bucket may need ?anonymous=true"
            ) from None

    @property
    def key(self) -> str:
        """Name of the path in pyarrow's file system."""
        return self._open()[1]

    def is_dir(self) -> bool:
        return self._listing() is not None

    def is_file(self) -> bool:
        return self._file() is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> BucketFile:
        if (file := self._file()) is None:
            raise FileNotFoundError(2, "no such file", str(self))
        return file

    def listed_stat(self) -> BucketFile:
        """Return `stat`, from a listing of the file's folder."""
        self.parent.is_dir()
        return self.stat()

    def entries(self) -> list[BucketEntry]:
        """Return the entries of a folder, sorted by name. An empty name: files whose keys have two slashes."""
        listing = self._listing() or {}
        return [BucketEntry(name, self / name, file) for name, file in sorted(listing.items())]

    def load_below(self) -> None:
        """List all folders below this one at once, which takes one request per 1,000 files."""
        filesystem, key = self._open()
        infos = self._request(
            lambda: filesystem.get_file_info(pafs.FileSelector(key, recursive=True, allow_not_found=True))
        )
        self._listings[key] = {}
        for info in infos:
            if info.type == pafs.FileType.File:
                *folders, name = info.path[len(key) + 1 :].split("/")
                folder = key
                for part in folders:
                    listing = self._listings[folder]
                    assert listing is not None
                    listing[part] = None
                    folder = f"{folder}/{part}"
                    if not self._listings.get(folder):
                        self._listings[folder] = {}
                    if not part:
                        break
                else:
                    listing = self._listings[folder]
                    assert listing is not None
                    listing.setdefault(name, _file(info))

    def forget_listings(self) -> None:
        self._listings.clear()

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the entries that match a pattern such as `*.txt` or `*/*.parquet`."""
        name_pattern, _, subfolder_pattern = pattern.partition("/")
        for entry in self.entries():
            if fnmatchcase(entry.name, name_pattern):
                if subfolder_pattern and entry.is_dir():
                    yield from entry.path.glob(subfolder_pattern)
                elif not subfolder_pattern:
                    yield entry.path

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file to read bytes."""
        assert mode == "rb"
        filesystem, key = self._open()
        stream = self.retry(lambda: filesystem.open_input_file(key))
        return cast(BinaryIO, io.BufferedReader(_RetryingFile(stream, self.retry), 1 << 16))

    def read_bytes(self, limit: int | None = None) -> bytes:
        """Return the file's bytes, or one byte more than `limit` if there are more."""
        filesystem, key = self._open()

        def read() -> bytes:
            try:
                with filesystem.open_input_file(key) as stream:
                    data: bytes = stream.read() if limit is None or stream.size() <= limit else stream.read(limit + 1)
                    return data
            except pa.ArrowInvalid as error:  # an empty part
                raise FileNotFoundError(2, str(error), str(self)) from None

        return self.retry(read)

    def retry(self, action: Callable[[], T]) -> T:
        """Return the value of an action that reads the bucket, as `with_retries` does."""
        return with_retries(action, self.anchor, is_refusal)

    def _open(self) -> tuple[pafs.FileSystem, str]:
        """Return the file system, and the name of the path in it."""
        bucket = self.anchor
        filesystem, base = open_bucket(bucket + (f"?{self._options}" if self._options else ""))
        return filesystem, base + self._location[len(bucket) :]

    def _request(self, action: Callable[[], T]) -> T:
        try:
            return self.retry(action)
        except OSError as error:
            raise UserError(f"cannot read {self}: {error}. {ACCESS_ADVICE}") from None

    def _listing(self) -> _Listing | None:
        """Return the content of a folder; None: there is none."""
        filesystem, key = self._open()
        if key not in self._listings:
            parent = self._listings.get(key.rpartition("/")[0])
            is_missing = parent is not None and parent.get(self.name, _MISSING) is not None  # or a file
            self._listings[key] = None if is_missing else self._request(lambda: self._list(filesystem, key))
        return self._listings[key]

    @staticmethod
    def _list(filesystem: pafs.FileSystem, key: str) -> _Listing | None:
        infos: Iterable[pafs.FileInfo] = filesystem.get_file_info(pafs.FileSelector(key, allow_not_found=True))
        # pyarrow returns the folder itself for keys with two slashes. An empty bucket is a folder, too.
        listing = {info.path[len(key) + 1 :]: _file(info) for info in infos}
        return listing if listing or "/" not in key else None

    def _file(self) -> BucketFile | None:
        filesystem, key = self._open()
        folder = None if self._listings.get(key) else self._listings.get(key.rpartition("/")[0], _MISSING)
        if isinstance(folder, dict):
            return folder.get(self.name)
        if folder is None:
            return None
        info = self._request(lambda: filesystem.get_file_info(key))
        return _file(info) if info.type == pafs.FileType.File else None


AnyPath = Path | BucketPath


def relative_path(path: AnyPath, root: AnyPath) -> str:
    """Return the path relative to a folder, with forward slashes."""
    return posixpath.relpath(*(str(path) if isinstance(path, Path) else path.location for path in (path, root)))


_MISSING: Any = object()


class _RetryingFile(io.RawIOBase):
    """File in a bucket whose reads are retried."""

    def __init__(self, stream: pa.NativeFile, retry: Callable[[Callable[[], bytes]], bytes]):
        self._stream, self._retry, self._position = stream, retry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stream.size()}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda: self._stream.read_at(len(buffer), self._position))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _file(info: pafs.FileInfo) -> BucketFile | None:
    return BucketFile(info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else None
