"""The CPU engine: NumPy alone, on all cores. :mod:`minunet.engines.cpu.engine` says where its ideas are."""
