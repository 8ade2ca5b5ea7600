"""The version of torchmto."""

__version__ = "0.1.0"
