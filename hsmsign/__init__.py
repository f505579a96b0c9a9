"""The service: HTTP in, HTTP out."""

from importlib.metadata import version

__version__ = version("hsmsign")
