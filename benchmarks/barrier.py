"""What it costs the processes of a team to meet: starting them, a command, and a barrier, from two processes up.

python benchmarks/barrier.py        medians, on an otherwise idle machine
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from minunet.base.environment import environment
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.team import Team, usable_size

REPEATS, BARRIERS = 15, 2000


class Meetings:
    """A program that does nothing but meet: its command is how often."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def run(self, command: Any) -> None:
        for _ in range(command):
            self.member.barrier()


def build(member: Member) -> Meetings:
    return Meetings(member)


def microseconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    import barrier  # this file: workers import what they run by its name, which __main__ is not

    print(f"{environment()['cpu']}, {os.cpu_count()} processors\n")
    print("| processes | start, ms | command, us | barrier, us |\n|---|---|---|---|")
    for size in range(2, max(2, usable_size()[0]) + 1):

        def start_and_end(size: int = size) -> None:
            Team(size, barrier.build, {}, 0).close()

        start = microseconds(start_and_end)
        with Team(size, barrier.build, {}, 0) as team:
            command = microseconds(partial(team.run, 0))
            meetings = microseconds(partial(team.run, BARRIERS))
        print(f"| {size} | {start / 1e3:.0f} | {command:.0f} | {(meetings - command) / BARRIERS:.1f} |", flush=True)


if __name__ == "__main__":
    main()
