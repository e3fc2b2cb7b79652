"""FedAvg that chooses whom to ask by what it has seen: tiers of equal speed, guided selection.

How long a device takes is read from the record ``delivery`` of its reply (virtual seconds on a
simulated network); in a plain Flower app, from when the reply was made and its instruction sent.
Both differ from `FedAvg` in nothing but the choice of devices.
"""

import hashlib
import math
import random
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from strategies.common import check, show_arguments
from strategies.compat import sample_nodes
from strategies.linear import Aggregate, FedAvg

__all__ = ["Oort", "TiFL"]

Seconds = Annotated[float, "seconds"]


class _Choosy(FedAvg):
    """FedAvg with a choice of its own; remembers response times and losses of devices.

    `round_metrics` tells the mean response time of those who replied, and how many different
    devices have replied so far.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_arguments(cls)

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self._forget()

    def _forget(self) -> None:
        self.seconds: dict[int, float] = {}  # node → last response time
        self.losses: dict[int, tuple[float, float]] = {}  # node → examples, train loss
        self.round_metrics: dict[str, float] = {}
        self._asked: dict[int, float] = {}  # node → when, wall time
        self._rng = random.Random()

    @abstractmethod
    def choose(self, server_round: int, online: Sequence[int], count: int) -> list[int]:
        """Return the nodes to ask, `count` of those online."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the devices chosen."""
        if self.fraction_train == 0.0:
            return []
        if server_round == 1:
            self._forget()
        self.round_metrics = {}
        key = f"{self.seed}/selection/{server_round}".encode()
        self._rng = random.Random(hashlib.blake2b(key, digest_size=8).digest())
        count = max(int(len(list(grid.get_node_ids())) * self.fraction_train), self.min_train_nodes)
        _, online = sample_nodes(grid, self.min_available_nodes, count)
        chosen = sorted(self.choose(server_round, sorted(online), count))
        asked = ConfigRecord({**config, "server-round": server_round})
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: asked})
        messages = list(self._construct_messages(record, chosen, MessageType.TRAIN))
        self._asked = {m.metadata.dst_node_id: m.metadata.created_at for m in messages}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average the models, and note what the replies tell of their devices."""
        received = list(replies)
        seen = []
        for message in received:
            node = message.metadata.src_node_id
            if message.has_error() or node not in self._asked:
                continue
            self.seconds[node] = _response_time(message, self._asked[node])
            seen.append(self.seconds[node])
            metrics = next(r for r in message.content.values() if isinstance(r, MetricRecord))
            examples = float(metrics[self.weighted_by_key])  # type: ignore[arg-type]
            self.losses[node] = examples, float(metrics.get("train_loss", math.nan))  # type: ignore[arg-type]
        self.observe(server_round, set(self._asked) - {m.metadata.src_node_id for m in received})
        self.round_metrics["devices_heard_of"] = float(len(self.losses))
        if seen:
            self.round_metrics["response_seconds"] = sum(seen) / len(seen)
        return super().aggregate_train(server_round, received)

    def observe(self, server_round: int, silent: set[int]) -> None:
        """Take notice of a round's replies, and of who did not reply."""


def _response_time(message: Message, asked: float) -> float:
    delivery = message.content.get("delivery")
    if isinstance(delivery, ConfigRecord):
        return float(delivery["finished"]) - float(delivery["started"])  # type: ignore[arg-type]
    return max(0.0, message.metadata.created_at - asked)


class TiFL(_Choosy):
    """Tier-based selection: a round asks devices of about equal speed.

    First all devices are asked `profile_rounds` times, and sorted by their response times into
    tiers of equal size; who has not answered is in the slowest. Then each round draws a tier, and
    its devices from it. Every `interval` rounds tiers whose devices have a higher mean train loss
    become likelier (the paper: a lower test accuracy, which costs an evaluation), and a tier may be
    drawn `credits` times at most while others have some left.

    Parameters
    ----------
    tiers : int
        How many; fewer where there are fewer devices.
    profile_rounds : int
        Rounds in which all are asked.
    interval : int
        Rounds between two looks at the losses; 0: all tiers stay equally likely.
    credits : int, optional
        Default: no limit.
    seed : int
        Of the draws.
    **kwargs
        Flower's `FedAvg`. A timeout bounds what the slowest tier costs.

    Attributes
    ----------
    tier_of : dict of int
        Node → tier, 0 the fastest.

    References
    ----------
    .. [1] Chai et al., "TiFL: a tier-based federated learning system", HPDC 2020, Algorithms 1, 2.
    """

    def __init__(
        self,
        *,
        tiers: int = 5,
        profile_rounds: int = 1,
        interval: int = 20,
        credits: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=seed, **kwargs)
        check(tiers >= 1, "tiers", tiers, "at least 1")
        check(profile_rounds >= 1, "profile_rounds", profile_rounds, "at least 1")
        check(interval >= 0, "interval", interval, "at least 0")
        check(credits is None or credits >= 1, "credits", credits, "at least 1")
        self.tiers = tiers
        self.profile_rounds = profile_rounds
        self.interval = interval
        self.credits = credits

    def _forget(self) -> None:
        super()._forget()
        self.tier_of: dict[int, int] = {}
        self._odds: list[float] = []
        self._left: list[float] = []

    def choose(self, server_round: int, online: Sequence[int], count: int) -> list[int]:
        """Return all nodes while they are profiled, then some of one tier."""
        if server_round <= self.profile_rounds:
            return list(online)
        if not self.tier_of:
            self._sort_into_tiers(online)
        members: list[list[int]] = [[] for _ in self._odds]
        for node in online:  # a newcomer counts as slow until it has answered
            members[self.tier_of.get(node, len(members) - 1)].append(node)
        odds = [
            odd if nodes and left > 0 else 0.0
            for odd, nodes, left in zip(self._odds, members, self._left, strict=True)
        ]
        if not any(odds):  # all credits are spent
            odds = [float(bool(nodes)) for nodes in members]
        (tier,) = self._rng.choices(range(len(members)), odds)
        self._left[tier] -= 1
        self.round_metrics["tier"] = float(tier)
        return self._rng.sample(members[tier], min(count, len(members[tier])))

    def observe(self, server_round: int, silent: set[int]) -> None:
        """Make tiers with higher losses likelier, from time to time."""
        if not (self.tier_of and self.interval and server_round % self.interval == 0):
            return
        sums = np.zeros((len(self._odds), 2))
        for node, (examples, loss) in self.losses.items():
            if math.isfinite(loss):
                sums[self.tier_of.get(node, len(sums) - 1)] += examples * loss, examples
        means = sums[:, 0] / np.maximum(sums[:, 1], 1e-300)
        if (means > 0).all():
            self._odds = (means / means.sum()).tolist()

    def _sort_into_tiers(self, online: Sequence[int]) -> None:
        order = sorted(online, key=lambda node: (self.seconds.get(node, math.inf), node))
        parts = np.array_split(np.array(order), min(self.tiers, len(order)))
        self.tier_of = {int(node): tier for tier, part in enumerate(parts) for node in part}
        self._odds = [1 / len(parts)] * len(parts)
        self._left = [math.inf if self.credits is None else self.credits] * len(parts)


class Oort(_Choosy):
    """Guided selection: devices with much to learn from, that are fast enough.

    The utility of a device is n_i L_i, with n_i examples of mean train loss L_i (the paper: the
    root of the mean squared loss of a sample, which devices do not report), cut at the 95th
    percentile, plus a bonus √(0.1 ln R / R_i) of the range for having last replied in round R_i of
    R, times (T/t_i)^α for those whose response time t_i is beyond T. A share ε of a round goes to
    devices that were never asked, drawn evenly; the others are drawn by utility from those within
    95 % of the best. T is a quantile of the response times seen, and moves up when the utility
    gained over `window` rounds falls.

    Parameters
    ----------
    exploration, min_exploration, exploration_decay : float
        ε in the first round, its least value, and its factor in each round.
    speed_penalty : float
        α; 0 does not look at speed.
    preferred_quantile : float
        Which share of the response times seen is below T at first.
    window : int
        Rounds over which the utility gained is compared; each time it falls T moves up by a tenth
        of the devices.
    seed : int
        Of the draws.
    **kwargs
        Flower's `FedAvg`.

    References
    ----------
    .. [1] Lai, Zhu, Madhyastha, Chowdhury, "Oort: efficient federated learning via guided
       participant selection", OSDI 2021, Eq. (1) and Algorithm 1.
    """

    def __init__(
        self,
        *,
        exploration: float = 0.9,
        min_exploration: float = 0.2,
        exploration_decay: float = 0.98,
        speed_penalty: float = 2.0,
        preferred_quantile: float = 0.5,
        window: int = 20,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=seed, **kwargs)
        for name, value in (
            ("exploration", exploration),
            ("min_exploration", min_exploration),
            ("exploration_decay", exploration_decay),
            ("preferred_quantile", preferred_quantile),
        ):
            check(0 <= value <= 1, name, value, "from 0 to 1")
        check(speed_penalty >= 0, "speed_penalty", speed_penalty, "at least 0")
        check(window >= 1, "window", window, "at least 1")
        self.exploration = exploration
        self.min_exploration = min_exploration
        self.exploration_decay = exploration_decay
        self.speed_penalty = speed_penalty
        self.preferred_quantile = preferred_quantile
        self.window = window

    def _forget(self) -> None:
        super()._forget()
        self._last: dict[int, int] = {}  # node → last round it replied in
        self._gained: list[float] = []
        self._quantile = getattr(self, "preferred_quantile", 0.5)
        self._tried: set[int] = set()

    def choose(self, server_round: int, online: Sequence[int], count: int) -> list[int]:
        """Return some nodes never asked, and some of the most useful."""
        share = self.exploration * self.exploration_decay ** (server_round - 1)
        share = max(self.min_exploration, share)
        new = [node for node in online if node not in self._tried]
        known = [node for node in online if node in self._last]
        n_new = min(len(new), max(round(share * count), count - len(known)))
        chosen = self._rng.sample(new, n_new)
        chosen += self._useful(server_round, known, count - n_new)
        rest = sorted(set(online) - set(chosen))
        chosen += self._rng.sample(rest, max(0, min(count - len(chosen), len(rest))))
        self._tried.update(chosen)
        return chosen

    def _useful(self, server_round: int, known: Sequence[int], count: int) -> list[int]:
        """Draw nodes by utility from those near the best."""
        if count <= 0 or not known:
            return []
        utility = self.utilities(server_round, known)
        order = np.argsort(-utility, kind="stable")
        least = 0.95 * utility[order[min(count, len(known)) - 1]]
        near = [(known[i], float(utility[i])) for i in order if utility[i] >= least]
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted draw without replacement.
        keys = [(self._rng.random() ** (1 / max(w, 1e-300)), node) for node, w in near]
        return [node for _, node in sorted(keys, reverse=True)[:count]]

    def utilities(self, server_round: int, nodes: Sequence[int]) -> np.ndarray:
        """Return the utility of nodes that have replied before, from 0 to about 1, shape (n,)."""
        gains = np.array([self._gain(node) for node in nodes])
        gains = np.minimum(gains, np.quantile(gains, 0.95))
        low, high = float(gains.min()), float(gains.max())
        scaled = (gains - low) / (high - low) if high > low else np.ones(len(gains))
        last = np.array([self._last[node] for node in nodes], float)
        scaled = scaled + np.sqrt(0.1 * math.log(max(server_round, 2)) / last)
        times = np.array([self.seconds[node] for node in nodes])
        preferred = float(np.quantile(list(self.seconds.values()), self._quantile))
        late = times > preferred
        scaled[late] *= (preferred / times[late]) ** self.speed_penalty
        return np.asarray(scaled)

    def _gain(self, node: int) -> float:
        examples, loss = self.losses[node]
        return examples * max(loss, 0.0) if math.isfinite(loss) else 0.0

    def observe(self, server_round: int, silent: set[int]) -> None:
        """Note who replied; allow slower devices when less is gained."""
        replied = [node for node in self._asked if node not in silent and node in self.losses]
        self._last |= dict.fromkeys(replied, server_round)
        self._gained.append(sum(map(self._gain, replied)))
        if len(self._gained) % self.window == 0 and len(self._gained) >= 2 * self.window:
            now = sum(self._gained[-self.window :])
            before = sum(self._gained[-2 * self.window : -self.window])
            if now < before:
                self._quantile = min(1.0, self._quantile + 0.1)
