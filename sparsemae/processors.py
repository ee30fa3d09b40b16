"""How many processors this process may use: those of its affinity, within its control group's quota."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def processors() -> int:
    """At least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota() or count)


def quota() -> int | None:
    """Processors that the process's control group and those above it leave, rounded up; None: no limit."""
    own = OWN_CGROUP.read_text().partition("0::/")[2].split("\n")[0] if OWN_CGROUP.is_file() else ""
    files = [group / "cpu.max" for group in (CGROUPS / own, *(CGROUPS / own).parents)]
    limits = [file.read_text().split() for file in files if file.is_file()]
    first = CGROUPS / "cpu"  # of version 1
    if (first / "cpu.cfs_quota_us").is_file():
        limits.append([(first / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")])
    numbers = [[int(word) for word in limit] for limit in limits if all(word.isdigit() for word in limit)]
    return min((-(-most // period) for most, period in numbers), default=None)  # "max" and -1 are no limit
