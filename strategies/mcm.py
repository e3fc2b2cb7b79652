"""MCM and its family as a Flower strategy: SGD with compression in both directions.

The equations are in `bidirectional`; here is who holds which version of what. A device's uplink
memory has the number of replies in it (``memory-version``): the server moves its copy when a reply
comes, and the device keeps its last two, so that it can go on from the one the server names if a
reply was lost. What the devices follow on the downlink (the model, or the memory H) has the number
of messages in it (``model-version``): the server moves on when it sends, and sends a device again
whatever it has not confirmed, or everything in full where that is shorter.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from numpy.typing import ArrayLike
from torch import Tensor

from strategies.bidirectional import (
    Correction,
    Rate,
    Scheme,
    Server,
    catch_up,
    draw_active,
    for_participation,
    nearest,
    scheme_of,
    upload,
)
from strategies.common import RowArray
from strategies.compat import fill, instructions, sample_nodes
from strategies.compression import Compressor, EncodedArray, Identity, Packed, compressor, pack
from strategies.halves import DeviceHalf, Draws, Payload, Tensors, stacked
from strategies.rows import decoded_rows, flat, shaped, sizes_of

__all__ = ["CompressedSGD", "CompressedSGDHalf"]

Spec = str | dict[str, Any]
_MESSAGES = "messages"
_MODEL = "model/"
_UNREACHED = (3, 4, 5)  # Flower's codes of errors that are the network's: no app has run


@dataclass(frozen=True)
class CompressedSGDHalf(DeviceHalf):
    """What a device does: follow the downlink, compress the gradient, keep memories.

    Parameters
    ----------
    scheme : Scheme
    is_nearest : bool
        Round to the nearest instead of randomly.
    """

    scheme: Scheme = field(default_factory=Scheme)
    is_nearest: bool = False
    name: ClassVar[str] = "mcm"

    def draws(self, rounds: ArrayLike, devices: ArrayLike, device: Any = "cpu") -> Draws:
        """Return the draws of these devices in these rounds."""
        if self.is_nearest:
            return lambda shape, dtype=torch.float64: nearest(shape, dtype).to(device)
        return super().draws(rounds, devices, device)

    def check(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError if tensors of these sizes cannot be compressed."""
        self.scheme.check(sizes)

    def unpack(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the dense arrays, and the decoded messages as ``messages/0``, …: ``(n, P)``."""
        result: Tensors = {}
        if "arrays" in contents[0]:
            records: Any = [content["arrays"] for content in contents]
            result = {key: stacked([record[key] for record in records]) for key in records[0]}
        if _MESSAGES not in contents[0]:
            return result
        config: Any = contents[0]["config"]
        dtype = getattr(torch, config["dtype"])
        blocks = self.scheme.blocks(config["tensors"])
        messages: Any = [content[_MESSAGES] for content in contents]
        for key in messages[0]:
            used = Identity() if key == "velocity" else self.scheme.down
            column = [record[key] for record in messages]
            result[f"{_MESSAGES}/{key}"] = decoded_rows(column, used, blocks, dtype)
        return result

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Return the model x_i, and the state after all messages."""
        scheme = self.scheme
        dense = {k: v for k, v in arrays.items() if not k.startswith(f"{_MESSAGES}/")}
        if scheme.downlink in ("plain", "ghost"):
            return dense, state
        state = dict(state)
        base = int(config["model-version"])
        if dense:
            model = held = flat(dense)
            seen = [base] * len(held)
            velocity = arrays.get(f"{_MESSAGES}/velocity")
            if velocity is None and scheme.momentum:
                velocity = torch.zeros_like(held)
            if scheme.downlink == "model" and not scheme.moves_down_memory:
                held = torch.zeros_like(held)
            template = dense
        else:
            template = {k.removeprefix(_MODEL): v for k, v in state.items() if _MODEL in k}
            if not template:
                raise ValueError("a message came to a device that was never sent a model")
            model = held = flat(template)
            seen, velocity = state["seen"].tolist(), state.get("velocity")
        steps = config.get("steps", [])
        if steps:
            rate = scheme.rate_down(scheme.blocks(sizes_of(template)), held)
            model, held, velocity = self._follow(
                arrays, [n - base for n in seen], held, velocity, steps, rate, model
            )
        for key, value in shaped(held, template).items():
            state[_MODEL + key] = value
        if velocity is not None:
            state["velocity"] = velocity
        state["seen"] = torch.tensor([max(n, base + len(steps)) for n in seen])
        return shaped(model, template), state

    def _follow(
        self,
        arrays: Tensors,
        n_seen: Sequence[int],
        held: Tensor,
        velocity: Tensor | None,
        steps: Sequence[float],
        rate: Rate,
        model: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the messages in order, those that a device has already seen to no effect."""
        for j, step in enumerate(steps):
            message = arrays[f"{_MESSAGES}/{j}"]
            new, moved, faster = catch_up(self.scheme, rate, held, velocity, message, step)
            if max(n_seen) <= j:
                model, held, velocity = new, moved, faster
                continue
            is_new = torch.tensor([[n <= j] for n in n_seen], device=held.device)
            model = torch.where(is_new, new, model)
            held = torch.where(is_new, moved, held)
            if velocity is not None and faster is not None:
                velocity = torch.where(is_new, faster, velocity)
        return model, held, velocity

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Mapping[str, Tensor | Payload], Tensors]:
        """Return the compressed gradient, and the state with memories that have it in them."""
        scheme = self.scheme
        gradient = flat(work)
        blocks = scheme.blocks(sizes_of(work))
        version = int(config["memory-version"])
        before = self._before(state, version, gradient)
        memory, error = before.get("memory"), before.get("error")
        sent: Packed
        if config.get("first-gradient"):
            sent, memory = pack(Identity(), gradient, draws), gradient
        else:
            choice = int(config.get("compressor", 0))
            sent, memory, error = upload(
                scheme.up[choice],
                scheme.rate_up(choice, blocks, gradient),
                gradient,
                memory,
                error,
                float(config.get("feedback", 0.0)),
                draws,
                blocks,
            )
        state = dict(state)
        for name, value in (("memory", memory), ("error", error)):
            if value is not None:
                state[name], state[f"{name}_before"] = value, before[name]
        state["version"] = torch.full((len(gradient),), version + 1)
        return {"message": sent}, state

    def _before(self, state: Tensors, version: int, like: Tensor) -> Tensors:
        """Return memory and error as they were when the server's copy was `version`."""
        scheme = self.scheme
        names = [
            n for n, has in (("memory", scheme.up_memory), ("error", scheme.up_feedback)) if has
        ]
        if version == 0:
            return {name: torch.zeros_like(like) for name in names}
        if "version" not in state:
            raise ValueError(f"the server holds version {version} of a memory that is not here")
        own = state["version"].tolist()
        if set(own) == {version}:
            return {name: state[name] for name in names}
        if not set(own) <= {version, version + 1}:
            raise ValueError(
                f"the server holds version {version} of a memory, a device has {own} and the one "
                "before"
            )
        is_last = torch.tensor([[each == version] for each in own], device=like.device)
        return {n: torch.where(is_last, state[n], state[f"{n}_before"]) for n in names}


@dataclass(frozen=True, slots=True)
class _Logged:
    """A downlink message that some device may not have yet."""

    version: int  # after it
    array: EncodedArray
    step: float

    @property
    def size_bytes(self) -> int:
        return self.array.shape[0]


class CompressedSGD(flower.FedAvg):
    """Distributed SGD with compression in both directions: MCM and its family.

    Every device sends one (compressed) stochastic gradient a round; all devices weigh the same.
    The model that is returned and evaluated is the server's own.

    Parameters
    ----------
    algorithm : str
        sgd, qsgd, diana, bi_qsgd, artemis, dore, dore_original, double_squeeze, dist_ef_sgd, ghost,
        mcm, rand_mcm, mcm_no_memory, mcm_undamped, artemis_nd.
    up : str, mapping or list, optional
        The compressor of the uplink: a name or a mapping with `kind`; a list gives device i entry
        i modulo its length. Default: quantise with one level. Unused if the algorithm does not
        compress there.
    down : str or mapping, optional
        The compressor of the downlink.
    learning_rate : float
        γ.
    schedule : {"constant", "inverse_sqrt"}
        Whether γ_k is γ or γ/√k.
    up_rate, down_rate : float, optional
        Memory rates a_up and a_down; default: 1/(2(ω+1)) of the compressor.
    momentum : float
        At the server, and at the devices too if they step.
    groups : int, optional
        Downlink memories of the MCM algorithms: 1 is shared, 0 one for each device.
    feedback : float or str, optional
        Coefficient of the error feedback: a number, ``first_step`` or ``rescaled``.
    participation : float
        p, the probability with which a device takes part in a round.
    correction : {"pp1", "pp2"}
        How partial participation is averaged (Artemis): pp2 keeps the mean of all memories.
    starts_at_gradient : bool, optional
        Whether uplink memories start at the first gradient, sent uncompressed.
    per_tensor : bool
        Whether each tensor is compressed by itself.
    averaged : bool
        Return and evaluate the mean of all iterates, w_0 included (Polyak-Ruppert).
    rounding : {"random", "nearest"}
        `nearest` uses 1/2 for every draw.
    seed : int
    min_available_nodes : int
    participants : callable, optional
        ``(round, node ids) -> node ids`` that take part, instead of draws.

    Attributes
    ----------
    device_halves : tuple
        ``ClientApp(mods=[as_mod(strategy.device_halves[0])])`` in a plain app.
    server : Server or None
        Models and memories, from the first round on.

    Raises
    ------
    ValueError
        If a name is unknown or a number out of its range.
    """

    def __init__(
        self,
        *,
        algorithm: str = "mcm",
        up: Spec | list[Spec] | None = None,
        down: Spec | None = None,
        learning_rate: float = 0.1,
        schedule: Literal["constant", "inverse_sqrt"] = "constant",
        up_rate: float | None = None,
        down_rate: float | None = None,
        momentum: float = 0.0,
        groups: int | None = None,
        feedback: float | str | None = None,
        participation: float = 1.0,
        correction: Correction = "pp1",
        starts_at_gradient: bool | None = None,
        per_tensor: bool = True,
        averaged: bool = False,
        rounding: Literal["random", "nearest"] = "random",
        seed: int = 0,
        min_available_nodes: int = 1,
        participants: Callable[[int, Sequence[int]], Sequence[int]] | None = None,
    ) -> None:
        super().__init__(
            min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=min_available_nodes
        )
        self.fraction_evaluate = 0.0  # given to the constructor, it would be warned of
        if not learning_rate > 0:
            raise ValueError(f"learning_rate is {learning_rate}; it must be above 0")
        for name, value, valid in (
            ("schedule", schedule, ("constant", "inverse_sqrt")),
            ("correction", correction, ("pp1", "pp2")),
            ("rounding", rounding, ("random", "nearest")),
        ):
            if value not in valid:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(valid)}")
        settings = {
            "up_rate": up_rate,
            "down_rate": down_rate,
            "groups": groups,
            "feedback": feedback,
            "starts_at_gradient": starts_at_gradient,
        }
        scheme = scheme_of(
            algorithm,
            None if up is None else _uplinks(up),
            None if down is None else compressor(down, "down"),
            momentum=momentum,
            per_tensor=per_tensor,
            **{name: value for name, value in settings.items() if value is not None},
        )
        if groups is not None and scheme.downlink != "model":
            raise ValueError(
                f"groups is {groups}, but {algorithm} has no downlink memory: leave it out"
            )
        if correction == "pp2" and not scheme.up_memory:
            raise ValueError(f"correction pp2 averages memories, which {algorithm} does not have")
        self.scheme = for_participation(scheme, participation)
        self.learning_rate, self.schedule, self.seed = learning_rate, schedule, seed
        self.participation, self.correction = participation, correction
        self.averaged = averaged
        self._n_groups = self.scheme.groups if self.scheme.downlink == "model" else 1
        self.server: Server | None = None
        self._mean = torch.zeros(0)
        self._rows: dict[int, int] = {}
        self._seen: list[int] = []  # model version that a device has confirmed; -1: none
        self._versions: list[int] = []  # of its uplink memory
        self._logs: dict[int, list[_Logged]] = {}
        self._sent_versions: dict[int, int] = {}
        self._dense_before: dict[int, Tensor] = {}
        self._pending: dict[int, int] = {}
        self._n_available = 0
        self._plain: ArrayRecord | None = None  # the model that all are sent in a round
        self._configs: dict[Any, ConfigRecord] = {}  # those of a round, by their values
        self._participants = participants
        self._is_nearest = rounding == "nearest"
        self.device_halves = (
            CompressedSGDHalf(seed=seed, scheme=self.scheme, is_nearest=self._is_nearest),
        )

    def summary(self) -> None:
        """Log nothing: Flower's own summary is about its weighted mean."""

    def step(self, server_round: int) -> float:
        """Return γ_k."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate / float(np.sqrt(server_round))

    # --- a round ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the instructions of a round: what each device misses, and its versions."""
        if server_round == 1 or self.server is None:
            self._begin(arrays)
        assert self.server is not None
        available, _ = sample_nodes(grid, self.min_available_nodes, len(list(grid.get_node_ids())))
        available.sort()
        chosen = self._choose(server_round, available)
        if self.scheme.downlink == "model" and server_round > 1:
            self._send_models(server_round, chosen)
        common = dict(config)
        common["server-round"], common["mode"] = server_round, "gradient"
        if self.scheme.up_feedback:
            common["feedback"] = self.scheme.coefficient(self.step, server_round)
        made: dict[tuple[int, ...], RecordDict] = {}
        contents = []
        self._pending, self._configs = {}, {}
        for node in chosen:
            row = self._rows[node]
            group = self._group(row)
            key = (group, self._seen[row], self._versions[row], row % len(self.scheme.up))
            if key not in made:
                made[key] = self._content(common, *key)
            contents.append(made[key])
            self._pending[node] = self._sent_versions.get(group, 0)
        self._dense_before.clear()
        return instructions(MessageType.TRAIN, contents, chosen)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model, and the mean loss of the devices that replied.

        Raises
        ------
        ValueError
            If a reply does not hold a gradient compressed by this strategy's device half.
        """
        server = self.server
        assert server is not None
        valid: dict[int, Message] = {}
        for message in replies:
            node = message.metadata.src_node_id
            if message.has_error():
                self._forget(message)
            elif node in self._pending:
                valid.setdefault(node, message)
        if not valid:
            return None, None
        nodes = sorted(valid, key=self._rows.__getitem__)
        numbers = [self._rows[node] for node in nodes]
        contents = [valid[node].content for node in nodes]
        sent = self._decode(numbers, _messages_in(nodes, contents), server)
        divisor = float(len(nodes))
        if self.participation < 1:
            share = len(nodes) / len(self._pending)
            divisor = self.participation * self._n_available * (share if share < 1 else 1)
        whole = len(nodes) == server.memory.shape[1] if server.memory.shape[1] > 1 else False
        rows = slice(None) if whole else torch.tensor(numbers)
        ghat = server.estimate(sent[None], rows, divisor, len(self._rows))
        for node, row in zip(nodes, numbers, strict=True):
            self._versions[row] += 1
            self._seen[row] = self._pending[node]
        self._prune(numbers)
        self._pending = {}
        message_out = server.update(ghat, server_round)
        if message_out is not None:
            packed, step = message_out
            self._log(0, packed.array(0), step)
        model = server.model[0]
        if self.averaged:
            self._mean = self._mean + (model - self._mean) / (server_round + 1)
            model = self._mean
        metrics = MetricRecord()
        if losses := _losses_in(contents):
            metrics["train_loss"] = float(np.mean(losses))
        return self._record(model), metrics

    # --- who takes part, and what they are sent -----------------------------------------------

    def _begin(self, arrays: ArrayRecord) -> None:
        """Start a run from this model."""
        values = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
        self._initial = arrays
        self._template = {k: v[None] for k, v in values.items()}
        self._tensors = sizes_of(self._template)
        model = flat(self._template)
        self._dense_bytes = model[0].numel() * model.itemsize
        self.server = Server(
            self.scheme,
            model,
            self._tensors,
            self.step,
            correction=self.correction,
            seeds=(self.seed,),
            is_nearest=self._is_nearest,
        )
        self._mean = model[0]
        self._rows, self._seen, self._versions = {}, [], []
        self._logs, self._sent_versions, self._dense_before, self._pending = {}, {}, {}, {}

    def _choose(self, server_round: int, available: list[int]) -> list[int]:
        """Return the nodes of a round, ascending; new ones are given a row."""
        assert self.server is not None
        for node in available:
            if node not in self._rows:
                self._rows[node] = len(self._rows)
                self._seen.append(-1)
                self._versions.append(0)
        self.server.grow(len(self._rows))
        self._n_available = len(available)
        self._plain = None
        if self._participants is not None:
            return sorted(self._participants(server_round, available))
        if self.participation == 1:
            return available
        active = draw_active((self.seed,), len(self._rows), server_round, self.participation)[0]
        return [node for node in available if active[self._rows[node]]]

    def _group(self, row: int) -> int:
        return row % self._n_groups if self._n_groups else row

    def _send_models(self, server_round: int, chosen: Sequence[int]) -> None:
        """Form the next message of each downlink memory of which a device takes part."""
        server = self.server
        assert server is not None
        groups = sorted({self._group(self._rows[node]) for node in chosen})
        is_all = groups == list(range(server.down_memory.shape[1]))
        index: Tensor | slice = slice(None) if is_all else torch.tensor(groups, dtype=torch.int64)
        before = server.down_memory[0, index]
        packed = server.send_model(server_round, index)
        for i, group in enumerate(groups):
            self._dense_before[group] = before[i]
            self._log(group, packed.array(i), 0.0)

    def _log(self, group: int, array: EncodedArray, step: float) -> None:
        """Note a message; forget what is longer to send than the model in full."""
        version = self._sent_versions.get(group, 0) + 1
        self._sent_versions[group] = version
        log = self._logs.setdefault(group, [])
        log.append(_Logged(version, array, step))
        while len(log) > 1 and sum(m.size_bytes for m in log[1:]) >= self._dense_bytes:
            del log[0]

    def _prune(self, rows: Sequence[int]) -> None:
        """Drop the messages that every device that has a model has confirmed."""
        for group in {self._group(row) for row in rows}:
            log = self._logs.get(group, [])
            if len(log) < 2:
                continue
            members = range(group, len(self._seen), self._n_groups or len(self._seen))
            oldest = min(self._seen[row] for row in members if self._seen[row] >= 0)
            while len(log) > 1 and log[0].version <= oldest:
                del log[0]

    def _content(
        self, common: Mapping[str, Any], group: int, seen: int, version: int, choice: int
    ) -> RecordDict:
        """Return the instruction of all devices that are alike in these respects."""
        server, scheme = self.server, self.scheme
        assert server is not None
        config = dict(common)
        config["memory-version"] = version
        if version == 0 and scheme.begins_with_gradient and self.correction == "pp1":
            config["first-gradient"] = True
        if choice:
            config["compressor"] = choice
        if scheme.downlink in ("plain", "ghost"):
            self._plain = self._plain or self._record(server.sent[0])
            return RecordDict({"arrays": self._plain, "config": self._shared(config)})
        content: dict[str, ArrayRecord | ConfigRecord] = {}
        current = self._sent_versions.get(group, 0)
        messages: dict[str, Array] = {}
        missed = [m for m in self._logs.get(group, []) if m.version > seen]
        is_known = seen >= 0 and len(missed) == current - seen
        last = missed[-1:] if scheme.downlink == "model" else []
        if not is_known or sum(m.size_bytes for m in missed) >= self._dense_bytes + sum(
            m.size_bytes for m in last
        ):
            missed = last
            before = self._dense_before.get(group) if scheme.downlink == "model" else None
            if before is None:
                self._plain = self._plain or self._record(server.model[0])
                content["arrays"] = self._plain
            else:
                content["arrays"] = self._record(before)
            if server.velocity is not None and scheme.downlink != "model" and current:
                velocity = pack(Identity(), server.velocity, nearest)
                messages["velocity"] = velocity.array(0)
        config["model-version"] = current - len(missed)
        config["tensors"], config["dtype"] = self._tensors, str(server.model.dtype).split(".")[1]
        if missed:
            config["steps"] = [m.step for m in missed]
        for j, logged in enumerate(missed):
            messages[str(j)] = logged.array
        if messages:
            content[_MESSAGES] = fill(ArrayRecord(), messages)
        content["config"] = self._shared(config)
        return fill(RecordDict(), content)

    def _shared(self, config: dict[str, Any]) -> ConfigRecord:
        """Return a config as a record: one for all instructions of a round with the same."""
        values = (tuple(v) if isinstance(v, list) else v for v in config.values())
        key = (*config, *values)
        if key not in self._configs:
            self._configs[key] = ConfigRecord(config)
        return self._configs[key]

    def _record(self, model: Tensor) -> ArrayRecord:
        """Return a model (P,) as Flower arrays; what is not floating-point as it began."""
        record = ArrayRecord()
        for key, value in shaped(model[None], self._template).items():
            is_moved = value.is_floating_point()
            record[key] = RowArray(value, 0) if is_moved else self._initial[key]
        return record

    # --- what they reply ----------------------------------------------------------------------

    def _forget(self, message: Message) -> None:
        """Start anew with a device whose app reported an error: nobody knows what it holds.

        A mean of all memories (pp2) cannot be put right for one device: all of them start anew.
        """
        node = message.metadata.src_node_id
        if node not in self._pending or message.error.code in _UNREACHED:
            return
        assert self.server is not None
        del self._pending[node]
        row = self._rows[node]
        self._seen[row], self._versions[row] = -1, 0
        if not self.scheme.up_memory:
            return
        if self.correction == "pp1":
            self.server.memory[:, row] = 0.0
        else:
            self.server.memory = torch.zeros_like(self.server.memory)
            self._versions = [0] * len(self._versions)

    def _decode(self, rows: Sequence[int], arrays: Sequence[Array], server: Server) -> Tensor:
        """Return Q_i (n, P) of the replies; first gradients become memories, and zero here."""
        scheme, model = self.scheme, server.model
        is_first = scheme.begins_with_gradient and self.correction == "pp1"
        places: dict[int, list[int]] = defaultdict(list)  # of each compressor; -1: none
        for i, row in enumerate(rows):
            places[-1 if is_first and self._versions[row] == 0 else row % len(scheme.up)].append(i)
        sent = None
        for choice, which in sorted(places.items()):
            used = Identity() if choice < 0 else scheme.up[choice]
            blocks = scheme.blocks(self._tensors)
            column = [arrays[i] for i in which]
            values = decoded_rows(column, used, blocks, model.dtype).to(model.device)
            if choice < 0:
                server.start_memory(torch.tensor([rows[i] for i in which]), values[None])
                values = torch.zeros_like(values)
            if len(which) == len(rows):
                return values
            sent = model.new_zeros((len(rows), model.shape[1])) if sent is None else sent
            sent[torch.tensor(which)] = values
        assert sent is not None
        return sent


def _uplinks(up: Spec | list[Spec]) -> list[Compressor]:
    """Return the compressors of the uplink."""
    if not isinstance(up, list):
        return [compressor(up, "up")]
    return [compressor(each, f"up[{i}]") for i, each in enumerate(up)]


def _messages_in(nodes: Sequence[int], contents: Sequence[RecordDict]) -> list[Array]:
    """Return the compressed gradients in replies, which must have some."""
    arrays = []
    proven: Any = None  # replies of one batch share the record of what was applied
    for node, content in zip(nodes, contents, strict=True):
        if "gradients" not in content:
            raise ValueError(
                f"node {node} replied with {sorted(content)}, not with 'gradients': its app "
                "ignored the config's mode 'gradient'"
            )
        applied: Any = content.get("applied", {"halves": []})
        if applied is not proven and CompressedSGDHalf.name not in applied["halves"]:
            raise ValueError(
                f"node {node} did not apply the half {CompressedSGDHalf.name!r}: "
                "ClientApp(mods=[as_mod(strategy.device_halves[0])])"
            )
        proven = applied
        gradients: Any = content["gradients"]
        arrays.append(gradients["message"])
    return arrays


def _losses_in(contents: Sequence[RecordDict]) -> list[float]:
    """Return the training losses that replies report."""
    names = (name for name, r in contents[0].items() if isinstance(r, MetricRecord))
    name = next(names, "metrics")
    records: list[Any] = [content.get(name, {}) for content in contents]
    return [record["train_loss"] for record in records if "train_loss" in record]
