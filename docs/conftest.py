"""Pages that register methods leave none behind."""

import pytest

from torchmto.methods import registry


@pytest.fixture(autouse=True)
def _own_methods_end_with_the_page(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # noqa: SLF001  there is no public way to forget a method
