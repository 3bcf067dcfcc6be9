"""Files of predictions: the form that the name of an output asks for, the check that it is new, and tables of text."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from pipeline.data.names import escape_for_terminal
from pipeline.errors import UserError
from pipeline.files import atomic_replace, is_uri, write_advice
from pipeline.prediction.image_prediction import COLUMNS, ImagePrediction

TEXT_FORMATS = ("csv", "tsv", "json", "jsonl")
STDOUT = "-"


def output_format(output: str) -> str:
    """Return one of TEXT_FORMATS, or `parquet`: a folder of Parquet files.

    Raises:
        UserError: another suffix, or a file of text in a bucket.
    """
    if output == STDOUT:
        return "csv"
    path = urlsplit(output).path if is_uri(output) else output
    suffix = os.path.splitext(path)[1].lower().removeprefix(".")
    if suffix in TEXT_FORMATS:
        if is_uri(output):
            raise UserError(f"--output {output}: a bucket takes Parquet only; leave out the suffix .{suffix}")
        return suffix
    if suffix not in ("", "parquet"):  # `folder/` has no suffix
        raise UserError(
            f"--output {output}: unknown suffix .{suffix}; use .csv, .tsv, .json, .jsonl or .parquet, or a folder "
            "with a `/` at the end"
        )
    return "parquet"


def check_new_output(output: str) -> None:
    """Create the parent folder of an output that does not exist yet.

    Raises:
        UserError: the output exists, and is no empty folder; or its parent cannot be created or written to.
    """
    if output == STDOUT:
        return
    if is_uri(output):
        from pyarrow.fs import FileSelector, FileType

        from pipeline.buckets import open_bucket

        filesystem, folder = open_bucket(output)
        try:
            is_file = filesystem.get_file_info(folder).type == FileType.File
            exists = is_file or bool(filesystem.get_file_info(FileSelector(folder, allow_not_found=True)))
        except OSError as error:
            raise UserError(f"cannot write --output {output}: {error}") from None
    else:
        path = Path(output).expanduser()
        exists = any(path.iterdir()) if path.is_dir() and output_format(output) == "parquet" else os.path.lexists(path)
    if exists:
        raise UserError(f"--output {output} already exists; use another name, or remove it")
    if not is_uri(output):
        parent = path.absolute().parent
        with write_errors(output):
            parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent).close()


@contextmanager
def write_errors(output: str) -> Iterator[None]:
    """Report an OSError as a UserError about the output."""
    try:
        yield
    except OSError as error:
        if output == STDOUT:
            raise
        raise UserError(
            f"cannot write --output {output}: {error.strerror or error}; {write_advice(error, '--output')}"
        ) from None


@contextmanager
def prediction_writer(output: str) -> Iterator[Callable[[ImagePrediction], None]]:
    """Yield a function that writes a prediction; the file appears when it is complete.

    CSV and TSV have the columns COLUMNS, with probabilities of four decimals; JSON is a list of objects, JSONL one
    object per line, `ImagePrediction.to_dict()`. Paths are escaped for terminals.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    with write_errors(output), ExitStack() as stack:
        stream: TextIO = sys.stdout
        if output != STDOUT:
            partial = stack.enter_context(atomic_replace(Path(output).expanduser()))
            stream = stack.enter_context(open(partial, "w", newline="", encoding="utf-8"))
        match output_format(output):
            case "csv" | "tsv" as name:
                yield _table_writer(stream, csv.excel if name == "csv" else csv.excel_tab)
            case "json":
                stream.write("[")
                separators = iter(["\n"])
                yield lambda prediction: _write_json(stream, prediction, prefix=next(separators, ",\n"))
                stream.write("\n]\n")
            case _:
                yield lambda prediction: _write_json(stream, prediction, suffix="\n")
        stream.flush()


def _table_writer(stream: TextIO, dialect: type[csv.Dialect]) -> Callable[[ImagePrediction], None]:
    writer = csv.writer(stream, dialect, lineterminator="\n")
    writer.writerow(COLUMNS)

    def write(prediction: ImagePrediction) -> None:
        values = _escaped(prediction)
        if prediction.probability is not None:
            values["probability"] = f"{prediction.probability:.4f}"
        writer.writerow([values[name] for name in COLUMNS])

    return write


def _write_json(stream: TextIO, prediction: ImagePrediction, prefix: str = "", suffix: str = "") -> None:
    stream.write(prefix + json.dumps(_escaped(prediction), ensure_ascii=False) + suffix)


def _escaped(prediction: ImagePrediction) -> dict[str, Any]:
    values = prediction.to_dict()
    if prediction.path is not None:
        values["path"] = escape_for_terminal(prediction.path)
    return values
