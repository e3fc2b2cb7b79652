import doctest
import importlib
import pkgutil

import pytest

import topologies

MODULES = [f"topologies.{m.name}" for m in pkgutil.iter_modules(topologies.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_everything_public_is_listed_in_order():
    assert topologies.__all__ == sorted(topologies.__all__)
    assert all(hasattr(topologies, name) for name in topologies.__all__)
