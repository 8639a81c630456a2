"""The release, apart from the package's own module: that one names what lies above."""

__version__ = "0.1.0"
