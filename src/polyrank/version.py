"""The version of polyrank that is installed."""

from importlib.metadata import version

__version__ = version("polyrank")
