"""Pages that register methods or write files leave none behind."""

import pytest

from torchmto.methods import registry


@pytest.fixture(autouse=True)
def _what_a_page_makes_ends_with_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # noqa: SLF001  there is no public way to forget a method
