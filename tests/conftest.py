"""Hypothesis profiles, the implementations that the contract tests run over, and a browser."""

import os
import shutil
import signal

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.implementations import IMPLEMENTATIONS

# Shapes and seeds are drawn by Hypothesis, values from the seed. CI draws the same examples each time.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
# For tests.tools.mutation and tests.tools.defects: thousands of short runs, whose failures nobody reads in their
# smallest form.
settings.register_profile(
    "mutation",
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
# A shell starts what it puts into the background with Ctrl-C ignored, and nohup with SIGHUP ignored, and the commands
# under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda implementation: implementation.name, scope="module")
def implementation(request):
    """NumPy, the strict stand-in for CuPy, and CuPy where a GPU answers; ``import cupy`` gives the one in use."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=IMPLEMENTATIONS[1:], ids=lambda implementation: implementation.name)
def device(request):
    """What is not plain NumPy: the strict stand-in for CuPy, and CuPy where a GPU answers."""
    with request.param.active():
        yield request.param


def chromium():
    """The path of a Chromium, or None."""
    named = os.environ.get("MINUNET_CHROMIUM")
    names = [named] if named else ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def browser():
    """A Chromium: Debian's ``chromium-headless-shell`` or ``chromium``, or what MINUNET_CHROMIUM names; else skips."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    path = chromium()
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium-headless-shell, or MINUNET_CHROMIUM=path")
    with playwright.sync_playwright() as driver:
        # In a container, as root, Chromium has no sandbox to offer. It opens only files of this repository here.
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()
