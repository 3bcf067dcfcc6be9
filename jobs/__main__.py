"""Run a job by its name: the command-line interface of an installed package.

mmap-clip full-pipeline                                the demo, which needs no data
mmap-clip check-data --data.root /data/shops           before the first run on images of your own
mmap-clip full-pipeline --data.root /data/shops
"""

from __future__ import annotations

from pipeline import interrupts

interrupts.handle_signals()
with interrupts.ending_at_once():
    import ast
    import importlib.metadata
    import importlib.util
    import re
    import sys
    from pathlib import Path

GROUPS = {
    "Train": ("check_data", "full_pipeline", "benchmark", "tune", "grouping_study", "add_task"),
    "Look": ("runs", "verify", "list_models", "resend"),
    "Use": ("predict", "serve", "export", "push", "register_model"),
    "Single stages": ("build_splits", "train_global_prompt", "solve_grouping", "train_groups"),
    "Shell": ("completion",),
}
USUAL_NAMES = {
    **dict.fromkeys(("train", "fit", "run", "start", "demo", "pipeline", "evaluate", "eval", "test"), "full-pipeline"),
    **dict.fromkeys(("check", "validate", "data"), "check-data"),
    **dict.fromkeys(("ls", "list", "status", "history", "show", "results"), "runs"),
    **dict.fromkeys(("fsck", "scrub", "checksum", "verify-storage"), "verify"),
    **dict.fromkeys(("models", "ls-models"), "list-models"),
    **dict.fromkeys(("infer", "inference", "classify", "prediction"), "predict"),
    **dict.fromkeys(("server", "deploy", "api"), "serve"),
    "register": "register-model",
    **dict.fromkeys(("publish", "hub", "push-to-hub"), "push"),
    **dict.fromkeys(("onnx", "convert", "save"), "export"),
    **dict.fromkeys(("search", "hpo", "sweep", "optimize"), "tune"),
    **dict.fromkeys(("bench", "compare"), "benchmark"),
    **dict.fromkeys(("send", "sync", "flush", "upload"), "resend"),
    **dict.fromkeys(("group", "grouping", "cluster"), "solve-grouping"),
    **dict.fromkeys(("split", "splits"), "build-splits"),
    "add": "add-task",
}
"""Name of a similar command of other tools → job."""
SUMMARY_WIDTH = 96


def job_names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    job, *arguments = sys.argv[1:] or ["--help"]
    module = job.replace("-", "_")
    if job == "help" and arguments:
        module, arguments = arguments[0].replace("-", "_"), ["--help"]
    if job in ("-h", "--help", "help") and module not in job_names():
        print(help_page(), end="")
    elif job in ("-V", "--version", "version"):
        print(f"mmap-clip {package_version()}")
    elif module in job_names():
        sys.argv = [f"mmap-clip {module.replace('_', '-')}", *arguments]
        run_script(module)
    else:
        print(f"error: unknown job {job}{suggestion(job)} All jobs: mmap-clip --help", file=sys.stderr)
        sys.exit(2)


def run_script(job: str) -> None:
    """Execute a job's script as the main module, which pydantic and cloudpickle look for by that name."""
    spec = importlib.util.spec_from_file_location("__main__", Path(__file__).with_name(f"{job}.py"))
    assert spec and spec.loader
    module, previous = importlib.util.module_from_spec(spec), sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["__main__"] = previous


def help_page() -> str:
    """Return the list of jobs, with the first sentence of each one's docstring."""
    lines = ["usage: mmap-clip JOB [OPTIONS]", "", *(__doc__ or "").splitlines()[2:], ""]
    for title, jobs in GROUPS.items():
        lines += [f"{title}:", *(f"  {job.replace('_', '-'):<21} {summary(job)}" for job in jobs), ""]
    return "\n".join([*lines, "mmap-clip JOB --help shows the options of a job, mmap-clip --version the version.", ""])


def summary(job: str) -> str:
    """Return the first sentence of a job's docstring, or its first clauses, without importing the job."""
    source = Path(__file__).with_name(f"{job}.py").read_text(encoding="utf-8")
    sentence = " ".join((ast.get_docstring(ast.parse(source)) or "").split()).split(". ")[0].removesuffix(".")
    clauses = [match.start() for match in re.finditer(r"[,;:] ", sentence[:SUMMARY_WIDTH])]
    return sentence if len(sentence) <= SUMMARY_WIDTH else sentence[: max(clauses)]


def suggestion(job: str) -> str:
    from pipeline.config import did_you_mean  # a third of a second

    name = job.lower().replace("_", "-")
    if name in USUAL_NAMES:
        return f"; did you mean {USUAL_NAMES[name]}?"
    return did_you_mean(name, [valid.replace("_", "-") for valid in job_names()])


def package_version() -> str:
    try:
        return importlib.metadata.version("mmap-clip")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
