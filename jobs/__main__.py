"""The jobs by their names, for where this is installed without its folder of scripts.

mmap-clip full_pipeline        the embedded demo
mmap-clip full_pipeline --config configs/office_home.yaml --data.root /data/OfficeHome
mmap-clip predict --help
"""

import runpy
import sys
from pathlib import Path


def job_names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    names, given = job_names(), sys.argv[1:2]
    if given in (["-h"], ["--help"]):
        print(f"usage: mmap-clip JOB [OPTIONS]\n\n{__doc__}\njobs: {', '.join(names)}")
    elif given and given[0] in names:
        sys.argv = [f"mmap-clip {given[0]}", *sys.argv[2:]]
        runpy.run_module(f"jobs.{given[0]}", run_name="__main__")
    else:
        sys.exit(f"error: {given[0] if given else 'nothing'} is no job; jobs: {', '.join(names)}")


if __name__ == "__main__":
    main()
