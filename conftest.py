"""Registers the project's pytest plugins, so that a bare `pytest` and `python -m pytest` behave alike."""

pytest_plugins = ["tests.support.noskips"]
