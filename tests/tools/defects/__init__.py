"""Seeded defects: mistakes that people really make, planted one at a time; each must be caught by a test.

``defects.toml`` lists them: the file, the exact line as it is and as it would be wrong, and one sentence. Each is
planted in a copy of the project, on which the module's own tests run until one fails. ``python -m tests.tools.defects``
runs all of them, and goes on where it was stopped. A defect whose line is not found exactly once, or whose tests do not
run, is an error and not a pass; and the undamaged copy must pass first.
"""
