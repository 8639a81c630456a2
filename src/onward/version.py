"""The version, in a module of its own because the package's `__init__` imports from higher layers."""

__version__ = "0.1.0"
