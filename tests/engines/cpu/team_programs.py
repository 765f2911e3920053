"""What the teams of tests/engines/cpu/test_team.py run. It is a module of its own because workers import it by name."""

import os
import time
from pathlib import Path


class Program:
    """Its commands are [name of a method, arguments ...]."""

    def __init__(self, member):
        self.member = member
        self.numbers = member.array(0, (member.size,), "float64")  # one a rank
        self.notes = member.array(512, (member.size,), "int64")

    def run(self, command):
        name, *arguments = command
        return getattr(self, name)(*arguments)

    def sum(self, rounds):
        """In each round every rank reads what all have just written."""
        total = 0.0
        for number in range(rounds):
            self.numbers[self.member.rank] = number + self.member.rank
            self.member.barrier()
            total += self.numbers.sum()
            self.member.barrier()
        return total

    def note_process(self):
        self.notes[self.member.rank] = os.getpid()

    def note_kind(self, value):
        self.notes[self.member.rank] = isinstance(value, list)

    def note_blas_threads(self):
        from threadpoolctl import threadpool_info

        self.notes[self.member.rank] = max(
            library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
        )

    def fail(self, rank):
        if self.member.rank == rank:
            raise ValueError("a planted failure")
        self.member.barrier()

    def interrupt(self):
        if self.member.rank == 0:
            raise KeyboardInterrupt
        self.member.barrier()

    def leave(self, rank, code):
        if self.member.rank == rank:
            os._exit(code)
        self.member.barrier()

    def signal(self, rank, number):
        """The process of ``rank`` sends itself a signal."""
        if self.member.rank == rank:
            os.kill(os.getpid(), number)
        self.member.barrier()

    def wait_for_each_other(self, seconds):
        """The ranks come to the barrier by turns, the last so much later that the others sleep."""
        for last in range(self.member.size):
            if self.member.rank == last:
                time.sleep(seconds)
            self.member.barrier()

    def go_on(self, begun, until):
        """Barriers, from when the file ``begun`` is made until there is one ``until``."""
        while True:
            # Not Path.exists, which handles an exception: Ctrl-C would come with that one's traceback too.
            self.numbers[0] = os.access(until, os.F_OK)
            self.member.barrier()
            if self.numbers[0]:
                return
            if self.member.rank == 0:
                Path(begun).touch()
            self.member.barrier()


def build(member, fails=None):
    if member.rank == fails:
        raise ValueError("a planted failure to build")
    return Program(member)
