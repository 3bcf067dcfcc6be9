"""CPU cores that a process may use; threads of torch and pyarrow follow them."""

from __future__ import annotations

import os

import pyarrow
import pytest
import torch

from pipeline.cpus import SLURM_VARIABLES, limit_threads, usable_cpus

MACHINE = 128


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """A machine of 128 cores, without limits of its own."""
    monkeypatch.setattr(os, "cpu_count", lambda: MACHINE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(MACHINE)), raising=False)
    for variable in SLURM_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # nested: the least of all levels
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}
            | {"sys/fs/cgroup/a/b/cpu.max": "800000 100000\n"},
            3,
        ),
        # a container that sees the path of its host
        ({"proc/self/cgroup": "0::/docker/c0ffee\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        # version 1, and both
        (
            {"proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/a/b\n0::/x\n", f"{V1}/a/cpu.cfs_quota_us": "600000\n"}
            | {f"{V1}/a/cpu.cfs_period_us": "100000\n", f"{V1}/a/b/cpu.cfs_quota_us": "-1\n"}
            | {f"{V1}/a/b/cpu.cfs_period_us": "100000\n"},
            6,
        ),
        (
            {"proc/self/cgroup": "3:cpuset:/\n", f"{V1}/cpu.cfs_quota_us": "1\n", f"{V1}/cpu.cfs_period_us": "9"},
            MACHINE,
        ),
        ({"proc/self/cgroup": "odd\n", "sys/fs/cgroup/cpu.max": "odd\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, MACHINE),
    ],
)
def test_quotas_of_containers(files, cpus, tmp_path):
    assert usable_cpus(write_tree(tmp_path, files)) == (cpus, "" if cpus == MACHINE else "cgroup quota")


def test_the_least_limit_counts(monkeypatch, tmp_path):
    write_tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"})
    assert usable_cpus(tmp_path) == (16, "cgroup quota")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "12")
    assert usable_cpus(tmp_path) == (12, "SLURM_CPUS_ON_NODE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert usable_cpus(tmp_path) == (8, "SLURM_CPUS_PER_TASK")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus(tmp_path) == (2, "CPU affinity")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "")
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert usable_cpus(tmp_path) == (12, "SLURM_CPUS_ON_NODE")


def test_threads_follow(monkeypatch):
    defaults = torch.get_num_threads(), pyarrow.cpu_count()
    try:
        torch.set_num_threads(MACHINE), pyarrow.set_cpu_count(MACHINE)
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
        limit_threads()
        assert (torch.get_num_threads(), pyarrow.cpu_count()) == (3, 3)
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
        limit_threads()  # never more than someone has set
        assert (torch.get_num_threads(), pyarrow.cpu_count()) == (3, 3)
    finally:
        torch.set_num_threads(defaults[0]), pyarrow.set_cpu_count(defaults[1])
