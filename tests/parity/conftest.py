"""Without PyTorch, pytest leaves alone what imports it (``--doctest-modules`` would import every file)."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["make_fixtures.py", "torch_reference.py"]
