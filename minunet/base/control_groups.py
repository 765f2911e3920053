"""Control groups: how Linux limits what a container, a batch job or a session may use of the machine.

A process is in a group, the group in another, and the limits of all of them hold. Version 2 of control groups has one
tree of folders, version 1 one for each resource.
"""

from pathlib import Path

OF_THIS_PROCESS = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def groups(resource: str) -> list[Path]:
    """The folders of this process's groups for ``resource``, "cpu" or "memory", from its own group up to the root.

    Some may not be there: a container sees only the upper end of its tree. Other systems have no groups at all.
    """
    try:
        lines = OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, resources, name = line.split(":", 2)  # of version 2, which has no list of resources: "0::/user.slice"
        if resources and resource not in resources.split(","):
            continue
        root = ROOT / resource if resources else ROOT
        own = root / name.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return found
