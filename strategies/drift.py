"""Servers that correct for devices which differ in data or in work: FedNova, SCAFFOLD, FedDyn.

Where devices make several steps on different data, plain averaging settles away from the optimum
("client drift"), and towards the devices that make more steps. FedNova corrects the second on the
server alone; SCAFFOLD and FedDyn correct both, by terms that live on the devices
(`strategies.halves`): a simulator applies them by itself, an app of one's own calls
``half.work(message, context)`` in its training loop.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from strategies.common import check, mean_of, record_of, show_arguments, tensor_of
from strategies.halves import DeviceHalf, Draws, LocalTerms
from strategies.linear import Aggregate, FedAvg, accepted, metrics_of, model_record

__all__ = ["SCAFFOLD", "FedDyn", "FedDynHalf", "FedNova", "ScaffoldHalf"]

Tensors = dict[str, Tensor]
_CONTROL = "control/"  # before a name: its control variate, beside the model in one record


class _DriftCorrected(FedAvg):
    """FedAvg that remembers the model it sent, and how many devices it has seen at one time."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_arguments(cls)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._model: Tensors = {}
        self._n_devices = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model, and what the method adds to it and to the config."""
        self._model = {key: tensor_of(array) for key, array in arrays.items()}
        if server_round == 1:
            self._n_devices = 0
            self.forget()
        self._n_devices = max(self._n_devices, len(list(grid.get_node_ids())))
        asked = ConfigRecord({**config, **self.asked()})
        return super().configure_train(server_round, self.sent(arrays), asked, grid)

    def forget(self) -> None:
        """Begin anew."""

    def asked(self) -> dict[str, Any]:
        """Return what is added to the config."""
        return {}

    def sent(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return what is sent for a model."""
        return arrays

    def _moved(self, towards: Mapping[str, Tensor], share: float) -> Tensors:
        """Return x + share · (m - x) for each array of the model."""
        moved = {}
        for key, value in self._model.items():
            target = towards[key].to(value.device)
            whole = value if target.dtype == value.dtype else value.to(target.dtype)
            moved[key] = torch.lerp(whole, target, share) if share != 1 else target
        return moved


class FedNova(_DriftCorrected):
    """FedNova: devices' directions are normalised by the work they made.

    d_i = (x - y_i) / (η a_i); x ← x - τ_eff η Σ p_i d_i, where p_i are shares of the examples, a_i
    weighs the gradients in y_i and τ_eff = Σ p_i a_i (Σ p_i K_i with a proximal term). For K_i
    steps a_i is K_i; with momentum m it is Σ_k (1 - m^(K_i - k)) / (1 - m); with a proximal term μ
    it is (1 - (1 - ημ)^K_i) / (ημ).

    Devices tell how many steps they made by the metric ``local_steps``; for those that do not it
    follows from the config (``local-steps``, or ``local-epochs`` and ``batch-size``) and their
    examples.

    Parameters
    ----------
    momentum : float
        m, of the devices' SGD; sent to them.
    proximal_mu : float
        μ, of their proximal term; sent to them. Not together with a momentum.
    learning_rate : float, optional
        η, needed with a proximal term only; default: the train config's.
    **kwargs
        Flower's `FedAvg`.

    References
    ----------
    .. [1] Wang, Liu, Liang, Joshi, Poor, "Tackling the objective inconsistency problem in
       heterogeneous federated optimization", NeurIPS 2020, Eq. (9) and section 4.
    """

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        proximal_mu: float = 0.0,
        learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        check(proximal_mu >= 0, "proximal_mu", proximal_mu, "at least 0")
        check(
            not (momentum and proximal_mu), "proximal_mu", proximal_mu, "0 where there is momentum"
        )
        self.momentum = momentum
        self.proximal_mu = proximal_mu
        self.learning_rate = learning_rate
        self._config: Mapping[str, Any] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask devices to train, and to say how many steps they made."""
        self._config = dict(config)
        return super().configure_train(server_round, arrays, config, grid)

    def asked(self) -> dict[str, Any]:
        """Ask for the number of steps; send momentum and proximal term where there are any."""
        asked: dict[str, Any] = {"report": "steps"}
        if self.momentum:
            asked["momentum"] = self.momentum
        if self.proximal_mu:
            asked["proximal-mu"] = self.proximal_mu
        return asked

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the model one normalised step further, and the mean metrics.

        Raises
        ------
        ValueError
            If nothing tells how many steps a device made, or the learning rate where it counts.
        """
        valid, shares = accepted(self, replies)
        if not valid:
            return None, None
        steps = torch.tensor([self._steps(message) for message in valid], dtype=torch.float64)
        work = self.accumulated(steps)
        effective = float(shares @ (steps if self.proximal_mu else work))
        scale = shares / work
        mean = mean_of(valid, scale / scale.sum())
        arrays = model_record(self._moved(mean, effective * float(scale.sum())))
        return arrays, metrics_of(self, valid)

    def accumulated(self, steps: Tensor) -> Tensor:
        """Return a_i, the weight of all gradients in K_i local steps, for each device.

        Parameters
        ----------
        steps : Tensor of float64, shape (n,)
        """
        if self.momentum:
            m = self.momentum
            return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)
        if self.proximal_mu:
            rate = self.learning_rate
            rate = self._config.get("learning-rate") if rate is None else rate
            if rate is None:
                raise ValueError("learning_rate: FedNova with a proximal term needs to know it")
            shrink = float(rate) * self.proximal_mu
            return (1 - (1 - shrink) ** steps) / shrink
        return steps

    def _steps(self, message: Message) -> float:
        """Return how many local steps a device made."""
        metrics = next(r for r in message.content.values() if isinstance(r, MetricRecord))
        if "local_steps" in metrics:
            return float(metrics["local_steps"])  # type: ignore[arg-type]
        if "local-steps" in self._config:
            return float(self._config["local-steps"])
        if "local-epochs" in self._config and "batch-size" in self._config:
            examples = float(metrics[self.weighted_by_key])  # type: ignore[arg-type]
            batch = float(self._config["batch-size"]) or examples
            return float(self._config["local-epochs"]) * -(-examples // batch)
        raise ValueError(
            f"node {message.metadata.src_node_id} does not say how many steps it made: FedNova "
            "needs the metric 'local_steps' in its reply, or 'local-steps' in the train config"
        )


@dataclass(frozen=True)
class ScaffoldHalf(DeviceHalf):
    """The device's part of SCAFFOLD: its control variate c_i, and steps along ∇f_i - c_i + c."""

    name: ClassVar[str] = "scaffold"

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Take the model and c; c_i is 0 at first."""
        model = {key: value for key, value in arrays.items() if not key.startswith(_CONTROL)}
        known: Tensors = {}
        for key, common in arrays.items():
            if key.startswith(_CONTROL):
                name = key.removeprefix(_CONTROL)
                own = state.get(f"own/{name}")
                known |= {
                    f"own/{name}": torch.zeros_like(common) if own is None else own.to(common),
                    f"common/{name}": common,
                    f"model/{name}": model[name],
                }
        return model, known

    def local(self, state: Tensors, config: Mapping[str, Any]) -> LocalTerms:
        """Add c - c_i to every gradient."""
        own, common = _part(state, "own/"), _part(state, "common/")
        return LocalTerms(control={name: common[name] - own[name] for name in own})

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Send y_i and the change of c_i; c_i ← c_i - c + (x - y_i) / (K η)."""
        path = config["steps-made"] * config["rate-used"]
        own, common = _part(state, "own/"), _part(state, "common/")
        sent, kept = dict(work), {}
        for name, model in _part(state, "model/").items():
            length = path.to(model).reshape(-1, *[1] * (model.dim() - 1))
            change = (model - work[name].to(model)) / length - common[name]
            sent[_CONTROL + name] = change
            kept[f"own/{name}"] = own[name] + change
        return sent, kept


class SCAFFOLD(_DriftCorrected):
    """SCAFFOLD (option II): control variates undo the drift of local steps.

    Devices step along ∇f_i(y) - c_i + c, then c_i⁺ = c_i - c + (x - y) / (K η);
    x ← x + (η_g / |S|) Σ (y_i - x); c ← c + (1/n) Σ (c_i⁺ - c_i), over the devices S that reply.
    Model and control variate travel both ways: two payloads. A device whose reply is lost keeps its
    old c_i. Devices are to train by plain SGD.

    Parameters
    ----------
    server_learning_rate : float
        η_g.
    n_devices : int, optional
        n; default: the most devices that were there at one time.
    **kwargs
        Flower's `FedAvg`. All devices weigh the same.

    References
    ----------
    .. [1] Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: stochastic controlled
       averaging for federated learning", ICML 2020, Algorithm 1.
    """

    device_halves = (ScaffoldHalf(),)

    def __init__(
        self, *, server_learning_rate: float = 1.0, n_devices: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check(server_learning_rate > 0, "server_learning_rate", server_learning_rate, "above 0")
        check(n_devices is None or n_devices >= 1, "n_devices", n_devices, "at least 1")
        self.server_learning_rate = server_learning_rate
        self.n_devices = n_devices
        self._control: Tensors = {}

    def forget(self) -> None:
        """Begin with c = 0."""
        floats = {key: v for key, v in self._model.items() if v.is_floating_point()}
        self._control = {key: torch.zeros_like(value) for key, value in floats.items()}

    def sent(self, arrays: ArrayRecord) -> ArrayRecord:
        """Send c beside the model."""
        control = {_CONTROL + key: value for key, value in self._control.items()}
        both = ArrayRecord()
        for key, array in (*arrays.items(), *model_record(control).items()):
            both[key] = array
        return both

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the new model and the mean metrics; c moves on.

        Raises
        ------
        ValueError
            If a device sends no control variate.
        """
        valid, _ = accepted(self, replies)
        if not valid:
            return None, None
        _check_half(valid, ScaffoldHalf, _CONTROL)
        mean = mean_of(valid, _evenly(valid))
        share = len(valid) / (self.n_devices or self._n_devices)
        self._control = {
            key: value + share * mean[_CONTROL + key].to(value)
            for key, value in self._control.items()
        }
        moved = self._moved(mean, self.server_learning_rate)
        return model_record(moved), metrics_of(self, valid)


@dataclass(frozen=True)
class FedDynHalf(DeviceHalf):
    """The device's part of FedDyn: its gradient g_i, a linear and a proximal term.

    Parameters
    ----------
    alpha : float
        α.
    """

    alpha: float = 0.1
    name: ClassVar[str] = "feddyn"

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Take the model; g_i is 0 at first."""
        known: Tensors = {}
        for name, model in arrays.items():
            if model.is_floating_point():
                own = state.get(f"own/{name}")
                known[f"own/{name}"] = torch.zeros_like(model) if own is None else own.to(model)
                known[f"model/{name}"] = model
        return arrays, known

    def local(self, state: Tensors, config: Mapping[str, Any]) -> LocalTerms:
        """Minimise f_i(y) - <g_i, y> + α/2 ‖y - x‖²."""
        own = _part(state, "own/")
        return LocalTerms(control={k: -v for k, v in own.items()}, proximal_mu=self.alpha)

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Send y_i; g_i ← g_i - α (y_i - x)."""
        own = _part(state, "own/")
        kept = {
            f"own/{name}": own[name] - self.alpha * (work[name].to(model) - model)
            for name, model in _part(state, "model/").items()
        }
        return work, kept


class FedDyn(_DriftCorrected):
    """FedDyn: a dynamic regulariser makes the devices' optima agree with the common one.

    Devices minimise f_i(y) - <g_i, y> + α/2 ‖y - x‖², then g_i ← g_i - α (y_i - x);
    h ← h - (α/n) Σ (y_i - x); x ← mean of y_i - h/α, over the devices that reply. One payload each
    way.

    Parameters
    ----------
    alpha : float
        α, above 0.
    n_devices : int, optional
        n; default: the most devices that were there at one time.
    **kwargs
        Flower's `FedAvg`. All devices weigh the same.

    References
    ----------
    .. [1] Acar, Zhao, Navarro, Mattina, Whatmough, Saligrama, "Federated learning based on dynamic
       regularization", ICLR 2021, Algorithm 1.
    """

    def __init__(self, *, alpha: float = 0.1, n_devices: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check(alpha > 0, "alpha", alpha, "above 0")
        check(n_devices is None or n_devices >= 1, "n_devices", n_devices, "at least 1")
        self.alpha = alpha
        self.n_devices = n_devices
        self.device_halves = (FedDynHalf(alpha=alpha),)
        self._h: Tensors = {}

    def forget(self) -> None:
        """Begin with h = 0."""
        floats = {key: v for key, v in self._model.items() if v.is_floating_point()}
        self._h = {key: torch.zeros_like(value) for key, value in floats.items()}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the new model and the mean metrics; h moves on.

        Raises
        ------
        ValueError
            If a device did not apply its half.
        """
        valid, _ = accepted(self, replies)
        if not valid:
            return None, None
        _check_half(valid, FedDynHalf)
        mean = mean_of(valid, _evenly(valid))
        share = self.alpha * len(valid) / (self.n_devices or self._n_devices)
        for key, value in self._h.items():
            self._h[key] = value - share * (mean[key].to(value) - self._model[key].to(value))
            mean[key] = mean[key] - self._h[key].to(mean[key]) / self.alpha
        return model_record(mean), metrics_of(self, valid)


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _evenly(valid: Sequence[Message]) -> Tensor:
    return torch.full((len(valid),), 1 / len(valid), dtype=torch.float64)


def _check_half(valid: Sequence[Message], half: type[DeviceHalf], prefix: str = "") -> None:
    """Refuse replies of devices that did not apply a half."""
    for message in valid:
        applied = message.content.get("applied")
        names: Any = applied.get("halves", []) if isinstance(applied, ConfigRecord) else []
        has_part = not prefix or any(key.startswith(prefix) for key in record_of(message))
        if half.name not in names or not has_part:
            raise ValueError(
                f"node {message.metadata.src_node_id} does not apply the device half "
                f"{half.name!r}: call strategies.drift.{half.__name__}().work(message, context) "
                "in its training loop"
            )
