"""The exceptions that fedsim raises on purpose, in one tree."""

__all__ = [
    "ExecutorError",
    "FedsimError",
    "MissingDataError",
    "NetworkError",
    "NoNodesError",
    "PayloadError",
    "ScenarioError",
]


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose."""


class ScenarioError(FedsimError):
    """The user's input is wrong: names the YAML path, the value and what is valid."""


class MissingDataError(ScenarioError):
    """The files of a well-known data set are not on this machine; the scenario may be right."""


class ExecutorError(FedsimError):
    """The processes that compute cannot be started, or die again and again."""


class NoNodesError(FedsimError):
    """A strategy waits for devices that can never come online."""


class PayloadError(FedsimError):
    """A message cannot travel as it asks to: unknown exchange, keys or payload."""


class NetworkError(FedsimError):
    """The network cannot do what is asked: no route, or nothing can ever be delivered."""
