"""CPU cores that this process may use, which on shared machines and in containers are fewer than the machine has."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

SLURM_VARIABLES = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


def usable_cpus(root: Path = Path("/")) -> tuple[int, str]:
    """Return the number of cores that this process may use, at least 1, and what limits it; "" if nothing does.

    Args:
        root: folder in place of / that has proc/ and sys/, for tests.
    """
    limits = {"": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["CPU affinity"] = len(os.sched_getaffinity(0))
    if quota := _cgroup_quota(root):
        limits["cgroup quota"] = max(1, int(quota))
    for variable in SLURM_VARIABLES:
        with suppress(KeyError, ValueError):
            limits[variable] = max(1, int(os.environ[variable]))
    reason = min(limits, key=limits.__getitem__)
    return limits[reason], reason


def limit_threads() -> None:
    """Let torch and pyarrow use no more threads in this process than cores: they do not know of quotas."""
    import pyarrow
    import torch

    cpus, _ = usable_cpus()
    if torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
    if pyarrow.cpu_count() > cpus:
        pyarrow.set_cpu_count(cpus)


def _cgroup_quota(root: Path) -> float | None:
    """Return the least quota in cores of the process's control groups (v1 or v2) and those that they are nested in."""
    with suppress(OSError, ValueError):
        quotas = []
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            # In a container the path may be one of the host, of which only the last part is mounted, as the root.
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                quotas.append(_quota(mount / group.relative_to("/"), is_v1=bool(controllers)))
        return min((quota for quota in quotas if quota), default=None)
    return None


def _quota(group: Path, is_v1: bool) -> float | None:
    with suppress(OSError, ValueError, ZeroDivisionError):
        if is_v1:
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        else:
            quota, period = map(int, (group / "cpu.max").read_text().split())  # "max" is no number
        return quota / period if quota > 0 else None
    return None
