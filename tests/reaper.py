"""Waits until the process that started it is gone, then ends what that has left: `reaper.py <MMAP_CLIP_TESTS>`.

It knows them by that mark in their environment, unique to one test process, and, since Ray's agents write their title
over it, by having seen them among the descendants. No process is taken for another: psutil compares start times.
"""

import os
import select
import sys

import psutil

POLL_INTERVAL_S = 1


def descendants(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.children(recursive=True)) - {psutil.Process()}
    except psutil.Error:  # it has ended
        return set()


def marked(mark: str) -> set[psutil.Process]:
    processes = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("MMAP_CLIP_TESTS") == mark:
                processes.add(process)
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return processes


tests, family = psutil.Process(os.getppid()), set()
while not select.select([sys.stdin], [], [], POLL_INTERVAL_S)[0]:
    family = {process for process in family | descendants(tests) if process.is_running()}
while running := {process for process in family if process.is_running()} | marked(sys.argv[1]):
    family |= running.union(*map(descendants, running))  # one may have started another meanwhile
    for process in running:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(running, timeout=5)
    family = {process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}
