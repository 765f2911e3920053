"""The notebook: a plain script, ``main_job.py``, and what makes a notebook of it: ``python -m docs.notebook``."""
