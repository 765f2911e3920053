"""Mutation testing: are the tests sharp enough to see a small mistake in the code?

A *mutant* is a module with one small mistake planted by a machine: a sign, a bound, a forgotten statement. It is
*killed* if one of the module's own tests fails, and *survives* if they all pass; the score is the share that is
killed. Each survivor is read: either a test is missing, or the mutant computes the same as the original, and is then
listed with the reason in ``equivalent.toml``.

``python -m tests.tools.mutation`` runs all of it, and goes on where it was stopped. The parts: ``mutants`` plants,
``trial`` runs tests on a copy of the project, ``__main__`` is the command. ``tests.tools.defects`` uses the same trials
for mistakes chosen by hand.

Why not mutmut or cosmic-ray: mutmut 3 leaves out what is not in a function's body (default values, class attributes)
and picks tests by who calls a function, so that every test of the U-Net would run for a mutant of ReLU. cosmic-ray
starts a process for each mutant (seconds, with NumPy, SciPy, pytest and Hypothesis to import; a fork takes
milliseconds), changes the working tree in place, and has one test command a session. Neither drops keyword arguments,
copies or statements, which is what people forget.
"""
