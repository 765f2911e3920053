"""The version of minunet."""

__version__ = "0.1.0"
