"""The daemon of pmblk: front ends, config and command line around the engine (`pmblk`)."""

from importlib.metadata import version

__version__ = version("pmblk")
