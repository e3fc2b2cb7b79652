import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from fedsim import registry
from fedsim.errors import ScenarioError
from fedsim.units import Bandwidth, Duration

HERE = __name__


@dataclass(frozen=True)
class Wobble:
    """Links that wobble.

    Parameters
    ----------
    period, pause : float
        Mean times.
    rate : float
        When up.
    """

    period: Duration
    pause: Duration = 60.0
    rate: Bandwidth = math.inf
    mode: Literal["fixed", "random"] = "fixed"
    levels: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.5)

    def __post_init__(self):
        if self.pause > self.period:
            raise ValueError(f"pause is {self.pause} s, above the period, {self.period} s")


class Opaque:
    pass


def split(labels, n_devices: int, *, rng, alpha: float, schema: int = 3):
    """Split."""
    return labels, n_devices, rng, alpha, schema


def open_ended(size: int, **extra: Any):
    return size, extra


def with_callable(fn: Callable[[int], int] | None = None, other: Opaque | None = None):
    return fn


def untyped(a, b=2):
    return a, b


def double(number: int) -> int:
    return 2 * number


def check(kind, spec):
    return registry.check(kind, spec, ("there",))


def messages(kind, spec):
    return [str(problem) for problem in check(kind, spec)[1]]


def test_defaults_are_filled_in_and_units_written_out():
    filled, problems = check("link", {"kind": f"{HERE}:Wobble", "period": "2 h", "rate": "1 MB/s"})
    assert problems == []
    assert filled == {
        "kind": f"{HERE}:Wobble",
        "period": "2 h",
        "pause": "1 min",
        "rate": "8 Mbit/s",
        "mode": "fixed",
        "levels": [1.0, 0.5],
    }


def test_filled_arguments_are_a_fixed_point():
    once, _ = check("link", {"kind": f"{HERE}:Wobble", "period": "2 h"})
    assert check("link", once) == (once, [])


def test_a_factory_is_called_with_parsed_arguments():
    spec = {"kind": f"{HERE}:Wobble", "period": "2 h", "levels": [2, 1]}
    assert registry.build("link", spec) == Wobble(7200.0, levels=(2.0, 1.0))


def test_supplied_values_reach_the_parameters_that_exist():
    spec = {"kind": f"{HERE}:split", "alpha": 1}
    made = registry.build("partition", spec, labels="l", n_devices=3, rng="r", device_ids=None)
    assert made == ("l", 3, "r", 1.0, 3)


def test_supplied_parameters_cannot_be_set():
    said = messages("partition", {"kind": f"{HERE}:split", "alpha": 1, "n_devices": 4})
    assert said == ["there.n_devices: 'n_devices' is filled in by fedsim and cannot be set here"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alfa": 1}, "there.alfa: unknown key; did you mean 'alpha'? Valid: alpha, schema"),
        ({}, "there.alpha: is missing, and has no default"),
        ({"alpha": "1"}, "there.alpha: '1' should be a valid number"),
        ({"alpha": True}, "there.alpha: true should be a valid number"),
        ({"alpha": 1, "schema": 1.5}, "there.schema: 1.5 should be a valid integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    assert messages("partition", {"kind": f"{HERE}:split"} | arguments) == [said]


def test_several_wrong_arguments_are_reported_together():
    spec = {"kind": f"{HERE}:Wobble", "period": 5, "mode": "fxed", "levels": [0]}
    assert messages("link", spec) == [
        "there.period: 5 has no unit; write for example '5 s'",
        "there.mode: 'fxed' should be 'fixed' or 'random'; did you mean 'fixed'?",
        "there.levels.0: 0 should be greater than 0",
    ]


def test_a_bundle_of_parameters_checks_itself():
    spec = {"kind": f"{HERE}:Wobble", "period": "1 s"}
    assert messages("link", spec) == ["there: pause is 60.0 s, above the period, 1.0 s"]


def test_extra_keyword_arguments_pass_where_the_factory_takes_them():
    assert registry.build("model", {"kind": f"{HERE}:open_ended", "size": 1, "depth": 2}) == (
        1,
        {"depth": 2},
    )


def test_untyped_parameters_take_anything():
    assert registry.build("model", {"kind": f"{HERE}:untyped", "a": [1, {"x": "y"}]}) == (
        [1, {"x": "y"}],
        2,
    )


def test_callables_are_given_as_import_strings():
    spec = {"kind": f"{HERE}:with_callable", "fn": f"{HERE}:double"}
    assert check("model", spec) == (spec, [])
    assert registry.build("model", spec)(4) == 8
    assert messages("model", spec | {"fn": f"{HERE}:dubble"}) == [
        f"there.fn: cannot import '{HERE}:dubble': '{HERE}' has no 'dubble'; did you mean 'double'?"
    ]


def test_a_parameter_that_yaml_cannot_express_keeps_its_default():
    names = [parameter.name for parameter in registry.parameters("model", f"{HERE}:with_callable")]
    assert names == ["fn"]


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("strategy", "fedprxo", "there: 'fedprxo' is no strategy; did you mean 'fedprox'?"),
        ("strategy", {"kind": "FedAvg"}, "there.kind: 'FedAvg' is no strategy; did you mean 'fed"),
        ("link", {"mean_up": 3}, "there.kind: is missing; one of: constant, correlated"),
        ("link", {"kind": 3}, "there.kind: 3 should be text; one of: constant, correlated"),
        ("link", 3, "there: 3 should be a name or a mapping with 'kind'"),
        ("model", "no_such_package:Net", "there: cannot import 'no_such_package:Net' (Module"),
        ("model", f"{HERE}:Nett", "has no 'Nett'"),
        ("model", f"{HERE}:HERE", "is not a function or class"),
        ("model", "a b:c", "'a b:c' is not of the form 'package.module:name'"),
    ],
)
def test_names_that_lead_nowhere_say_so(kind, spec, said):
    (message,) = messages(kind, spec)
    assert said in message


def test_a_module_that_fails_names_the_import_string_and_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_room.py").write_text("raise OSError('disk on fire')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ScenarioError, match=r"'broken_room:thing' \(OSError: disk on fire\)"
    ) as error:
        registry.resolve("model", "broken_room:thing")
    assert isinstance(error.value.__cause__, OSError)


def refuse(size: int):
    raise ValueError(f"size is {size}; only 3 will do")


def test_what_a_factory_refuses_is_an_error_of_the_scenario():
    with pytest.raises(ScenarioError, match=r"model '.*:refuse': size is 4; only 3 will do"):
        registry.build("model", {"kind": f"{HERE}:refuse", "size": 4})


def test_nested_strategies_are_checked_and_built_first():
    inner = {"kind": "flwr.serverapp.strategy:FedAvg", "fraction_train": 0.5}
    spec = {"kind": "dp_server_fixed", "noise_multiplier": 1, "clipping_norm": 2.0}
    spec |= {"num_sampled_clients": 3, "strategy": inner}
    made = registry.build("strategy", spec)
    assert made.strategy.fraction_train == 0.5
    assert made.clipping_norm == 2.0
    wrong = spec | {"strategy": inner | {"fraction_trian": 1}}
    (said,) = messages("strategy", wrong)
    assert said.startswith("there.strategy.fraction_trian: unknown key; did you mean 'fraction_tra")


@pytest.mark.parametrize("kind", list(registry.TABLES))
def test_every_registered_name_can_be_imported_and_listed(kind):
    for entry in registry.list_names(kind):
        assert entry.error is None
        assert entry.summary
        assert all(parameter.type for parameter in entry.parameters)


@pytest.mark.parametrize("kind", list(registry.TABLES))
def test_every_registered_name_has_a_schema_of_its_arguments(kind):
    titles = [choice.get("title") for choice in registry.spec_schema(kind)["anyOf"]]
    assert set(titles) >= set(registry.TABLES[kind])


def test_parameters_carry_their_docstrings():
    found = {p.name: p for p in registry.parameters("link", f"{HERE}:Wobble")}
    assert found["pause"].description == "Mean times."
    assert found["pause"].type == "time"
    assert found["mode"].type == "fixed | random"
    assert found["period"].is_required
    assert not found["rate"].is_required
