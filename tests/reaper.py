"""Waits until the process at the other end of standard input is gone, then ends all processes that carry its mark:
`reaper.py <value of MMAP_CLIP_TESTS>`. A process is never taken for another: the mark is unique to one test process."""

import sys

import psutil


def marked(mark: str) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MMAP_CLIP_TESTS") == mark and process.pid != psutil.Process().pid:
                processes.append(process)
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return processes


sys.stdin.read()
while left := marked(sys.argv[1]):  # again: one may have started another meanwhile
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
