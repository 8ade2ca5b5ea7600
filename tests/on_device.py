"""Runs the tests of the core on another device: ``pytest --device cuda tests/battery tests/step ...``."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

TESTS = str(Path(__file__).parent)


def put_everything_on(device: str) -> None:
    """From now on what tests and modules make without naming a device is made on this one.

    Random numbers of a generator are drawn where the generator is, so that a test has the same data everywhere. What tests
    themselves read as an array or compare is brought to the CPU first, where the package leaves what it tells; the package's
    own calls are left as they are. Scalers belong to the device, whatever device is named.

    Args:
        device: The device.
    """
    _device_constructors()  # it keeps what it finds: the functions that are replaced here
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, _drawn(getattr(torch, name)))
    for holder, name in (
        (torch, "equal"),
        (torch, "allclose"),
        (Tensor, "equal"),
        (Tensor, "numpy"),
        (Tensor, "__array__"),
    ):
        setattr(holder, name, _read(getattr(holder, name)))
    torch.testing.assert_close = functools.partial(torch.testing.assert_close, check_device=False)

    class OwnScaler(torch.amp.GradScaler):
        def __init__(self, _: str, **options: Any) -> None:
            super().__init__(device, **options)

    torch.amp.GradScaler = OwnScaler
    torch.set_default_device(device)


def _drawn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        generator = kwargs.get("generator")
        if generator is None or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        return function(*args, **kwargs, device=generator.device).to(torch.get_default_device())

    return drawn


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def read(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_filename.startswith(TESTS):
            args = tuple(argument.cpu() if isinstance(argument, Tensor) else argument for argument in args)
        return function(*args, **kwargs)

    return read
