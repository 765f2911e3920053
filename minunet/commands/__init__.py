"""The command line: ``minunet train``, ``minunet predict``, ``minunet evaluate``.

Each file is one command, and puts together what the rooms below it have: options become a preset, data, a network, an
engine and a run. :mod:`minunet.__main__` finds the commands, and those of the modules that are run by name.
"""
