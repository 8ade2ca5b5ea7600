"""Multi-task optimisation for PyTorch: which task's gradient wins, decided at every step."""

from torchmto._version import __version__

__all__ = ["__version__"]
