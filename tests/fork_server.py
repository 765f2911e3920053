"""Commands without the seconds of their imports: one process imports what they need, and forks for each command.

tests/command_line.py starts it as ``python -W error -m tests.fork_server``, its stdin a socket, and sends requests. A
fork then has its own folder, environment, stdin, stdout and stderr, and runs the script as ``__main__``; signals, exit
code and files are those of any process. It keeps only what it has from here: the modules and what they read of the
environment when they were imported, and one thread for BLAS, since a process with several must not be forked.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def import_everything():
    """What the examples import, at once or when they come to it."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import PIL.Image
    import scipy.ndimage  # noqa: F401
    import threadpoolctl  # noqa: F401
    import tqdm  # noqa: F401

    import minunet.engines.cpu.choice
    import minunet.results.report  # noqa: F401

    PIL.Image.init()
    for script in ("train_lgg", "predict", "evaluate"):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="imported")
    # The commands themselves each fork imports anew: what ``before`` has changed by then, they find changed.
    for name in [name for name in sys.modules if name.startswith("minunet.commands")]:
        del sys.modules[name]


def next_request(requests):
    """In the server: fork for each request, and send how it ended. Returns in the forks, with the request."""
    while True:
        line, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not line:
            sys.exit()
        process = os.fork()
        if process == 0:
            requests.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return json.loads(line)
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(process, 0)
        requests.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def main():
    import_everything()
    gc.collect()
    gc.freeze()  # else the first collection of a fork would copy every page
    with socket.socket(fileno=os.dup(0)) as requests:
        request = next_request(requests)
    signal.alarm(request["timeout"])  # ends a fork that hangs
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script, *arguments = request["argv"]
    sys.argv, sys.path[0] = [script, *arguments], str(EXAMPLES)
    exec(request["before"], {"__name__": "__main__"})
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
