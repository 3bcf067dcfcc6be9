"""Run a job by its name: the command-line interface of an installed package.

mmap-clip full-pipeline        the built-in demo
mmap-clip full-pipeline --config configs/office_home.yaml --data.root /data/OfficeHome
mmap-clip predict --help
"""

import runpy
import sys
from pathlib import Path

from pipeline.interrupts import handle_signals


def job_names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    handle_signals()
    names, job = [name.replace("_", "-") for name in job_names()], "".join(sys.argv[1:2])
    if job in ("-h", "--help"):
        print(f"usage: mmap-clip JOB [OPTIONS]\n\n{__doc__}\njobs: {', '.join(names)}")
    elif (module := job.replace("-", "_")) in job_names():
        sys.argv = [f"mmap-clip {module.replace('_', '-')}", *sys.argv[2:]]
        runpy.run_module(f"jobs.{module}", run_name="__main__")
    else:
        sys.exit(f"error: {f'unknown job {job}' if job else 'no job given'}; jobs: {', '.join(names)}")


if __name__ == "__main__":
    main()
