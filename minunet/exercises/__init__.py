"""Exercises: write a backward pass and have it checked, or find the bug that was planted.

``python -m minunet.exercises`` lists them; docs/exercises.md says more. Nothing in minunet imports this package.

In reading order:

1. ``exercise``   what an exercise is, and how it says what was expected and what came
2. ``learner``    the learner's file: read it, call its functions, show the line that raised
3. ``backward``   what every hand-written backward is held to
4. one file an exercise: its checks, the wrong solutions it recognises, its hints

``starters`` holds the files that learners begin with; the solutions lie apart, in docs/exercises/solutions.
"""
