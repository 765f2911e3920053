"""The files that learners begin with: ``python -m minunet.exercises start NAME`` copies one."""
