"""What a collective should take: alpha-beta-gamma formulas, lower bounds, job completion times.

M is the bytes of the whole vector, B the rate of one port, N the workers, alpha the seconds per
step, gamma the seconds per byte added.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from topologies.attributes import Graph, devices_of, family_of, hosts_of
from topologies.routing import link_table
from topologies.timing import CostModel

__all__ = [
    "ClosedForm",
    "bus_bandwidth",
    "closed_form",
    "crossover_bytes",
    "job_reduction",
    "lower_bound",
    "required_efficiency",
]


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """steps * alpha + transfer * M / B + reduce * M * gamma.

    Attributes
    ----------
    steps : int
    transfer, reduce : Fraction
        Coefficients of M / B and of M gamma.
    formula : str
        The transfer coefficient in symbols.
    """

    steps: int
    transfer: Fraction
    reduce: Fraction
    formula: str

    def seconds(self, size_bytes: float, rate_bps: float, model: CostModel | None = None) -> float:
        """Return the time of a vector of `size_bytes` on ports of `rate_bps`."""
        model = model or CostModel()
        return (
            self.steps * model.step_latency
            + float(self.transfer) * 8.0 * size_bytes / rate_bps
            + float(self.reduce) * size_bytes * model.reduce_seconds_per_byte
        )


def closed_form(collective: str, graph: Graph, *, servers: int = 1) -> ClosedForm | None:
    """Return the formula of a collective on a graph, or None where there is none.

    Known are networks that do not block (a star, a Fat-Tree or leaf-spine without
    oversubscription; p planes divide the transfer by p), BCube, and rings in the dimensions of a
    torus. All assume equal rates, even splitting and no losses.

    Parameters
    ----------
    collective : str
        A name of `topologies.placement.COLLECTIVES`.
    graph : networkx.Graph
    servers : int
        Of a dedicated parameter server.

    Examples
    --------
    >>> from topologies.datacentre import bcube
    >>> closed_form("bml", bcube(3, 2)).transfer
    Fraction(8, 9)
    """
    n_ranks = len(devices_of(graph))
    sizes = graph.graph.get("parameters", {})
    family = family_of(graph)
    if family == "bcube":
        return _on_bcube(collective, n_ranks, int(sizes["n"]), int(sizes["k"]))
    if family == "torus":
        return _on_torus(collective, n_ranks, tuple(sizes["dims"]))
    if _is_non_blocking(graph):
        form = _one_port(collective, n_ranks, servers)
        if collective == "ps_dedicated" and family == "star" and not sizes.get("servers"):
            return ClosedForm(2, Fraction(2), Fraction(0), "2, the server's port unlimited")
        planes = int(sizes.get("planes", 1))
        if form is None or planes == 1:
            return form
        formula = f"({form.formula})/{planes}"
        return ClosedForm(form.steps, form.transfer / planes, form.reduce, formula)
    return None


def _is_non_blocking(graph: Graph) -> bool:
    family, sizes = family_of(graph), graph.graph.get("parameters", {})
    if family == "fat_tree":
        return bool(sizes.get("oversubscription", 1) == 1)
    if family == "leaf_spine":
        default = sizes["hosts_per_leaf"] / sizes["spines"]
        return bool(sizes.get("oversubscription", default) <= 1)
    return family == "star"


def _one_port(collective: str, n: int, servers: int) -> ClosedForm | None:
    """Return the formula with one port a host and a network that does not block."""
    log_up = (n - 1).bit_length()
    size = 1 << n.bit_length() - 1
    folded = size != n
    each, none = Fraction(n - 1, n), Fraction(0)
    log_down = size.bit_length() - 1
    extra = 2 if folded else 0
    known = {
        "ring": ClosedForm(2 * (n - 1), 2 * each, each, "2(N-1)/N"),
        "ps_colocated": ClosedForm(2, 2 * each, each, "2(N-1)/N"),
        "halving_doubling": ClosedForm(
            2 * log_down + extra,
            Fraction(2 * (size - 1), size) + extra,
            Fraction(size - 1, size) + (1 if folded else 0),
            "2(P-1)/P + 2, P = 2^floor(log2 N)" if folded else "2(N-1)/N",
        ),
        "recursive_doubling": ClosedForm(
            log_down + extra,
            Fraction(log_down + extra),
            Fraction(log_down + (1 if folded else 0)),
            "log2 P + 2, P = 2^floor(log2 N)" if folded else "log2 N",
        ),
        "binomial_tree": ClosedForm(
            2 * log_up, Fraction(2 * log_up), Fraction(log_up), "2 ceil(log2 N)"
        ),
        "all_to_all": ClosedForm(1, Fraction(n - 1), Fraction(n - 1), "N-1"),
        "ps_dedicated": ClosedForm(
            2, 2 * max(Fraction(n, servers), Fraction(1)), Fraction(n, servers), "2 max(N/S, 1)"
        ),
    }
    form = known.get(collective)
    return form if form is None or n > 1 else ClosedForm(form.steps, none, none, form.formula)


def _on_bcube(collective: str, total: int, n: int, k: int) -> ClosedForm | None:
    each = Fraction(total - 1, total)
    known = {
        "bml": ClosedForm(2 * k, 2 * each / k, each, "2(N-1)/(N k)"),
        "ring": ClosedForm(2 * (total - 1), 2 * each, each, "2(N-1)/N, Gray order"),
        "ps_colocated": ClosedForm(2, Fraction(2 * (n - 1), n), each, "2(n-1)/n"),
        "dimension_rings": ClosedForm(2 * k * (n - 1), 2 * each, each, "2(N-1)/N"),
        "rotated_rings": ClosedForm(2 * k * (n - 1), 2 * each / k, each, "2(N-1)/(N k)"),
    }
    return known.get(collective)


def _on_torus(collective: str, total: int, dims: tuple[int, ...]) -> ClosedForm | None:
    each = Fraction(total - 1, total)
    steps = 2 * sum(size - 1 for size in dims)
    if collective == "dimension_rings":
        return ClosedForm(steps, 2 * each, each, "2(N-1)/N")
    if collective == "rotated_rings" and len(set(dims)) == 1:
        return ClosedForm(steps, 2 * each / len(dims), each, "2(N-1)/(N d)")
    return None


def lower_bound(
    graph: Graph, size_bytes: float, *, servers_used: int = 0, step_latency: float = 0.0
) -> float:
    """Return seconds that no schedule can beat on this graph, if only hosts add.

    One step, plus the larger of two transfers: every device must receive and send the whole sum's
    worth once over its own cables (M over its slowest direction); and all hosts together must send
    each element N - 1 times to add it up and N - 1 times to spread it (2 (N - 1) M over the rates
    of all ports). With equal ports the second is 2 (N - 1) / (N k) M / B.

    Parameters
    ----------
    graph : networkx.Graph
        Edges with ``bandwidth``.
    size_bytes : float
        M.
    servers_used : int
        Dedicated servers whose ports help.
    step_latency : float
        alpha.

    References
    ----------
    .. [1] Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication: theory, practice,
       and experience", Concurrency and Computation 2007.
    """
    links = link_table(graph)
    devices = devices_of(graph)
    out = np.bincount(links.source, links.bandwidth, links.n_nodes)
    into = np.bincount(links.target, links.bandwidth, links.n_nodes)
    slowest = min(float(out[devices].min()), float(into[devices].min()))
    hosts = hosts_of(graph)[: len(devices) + servers_used]
    bits = 8.0 * size_bytes
    together = 2 * (len(devices) - 1) * bits / float(out[hosts].sum())
    return step_latency + max(bits / slowest if slowest else math.inf, together)


def bus_bandwidth(size_bytes: float, n_ranks: int, seconds: float) -> float:
    """Return bit/s as NCCL's tests count them: 2 (N - 1) / N M / T, whatever the collective."""
    return 16.0 * (n_ranks - 1) / n_ranks * size_bytes / seconds


def crossover_bytes(
    sizes: tuple[float, float], ours: tuple[float, float], theirs: tuple[float, float]
) -> float | None:
    """Return the size at which two straight lines of time over size cross, if between two sizes.

    Parameters
    ----------
    sizes : (float, float)
        Bytes, ascending.
    ours, theirs : (float, float)
        Seconds at these sizes.

    Examples
    --------
    >>> crossover_bytes((0, 100), (4, 5), (2, 8))
    40.0
    """
    gap = ours[0] - theirs[0], ours[1] - theirs[1]
    if gap[0] * gap[1] >= 0:
        return None
    return sizes[0] + (sizes[1] - sizes[0]) * gap[0] / (gap[0] - gap[1])


def job_reduction(k: int, compute_ratio: float, *, efficiency: float = 1.0) -> float:
    """Return by how much BML shortens a job against a co-located parameter server.

    Iterations do not overlap compute C and synchronisation S. With q = S_BML / S_PS = e / k and
    c = C / S_PS the reduction is (1 - q) / (1 + c).

    Parameters
    ----------
    k : int
        Levels of BCube.
    compute_ratio : float
        c.
    efficiency : float
        e, the parameter server's efficiency relative to BML's; 1 is the ideal model.

    Examples
    --------
    >>> job_reduction(2, 0.25), round(job_reduction(2, 0.0, efficiency=0.872), 3)
    (0.4, 0.564)
    """
    if k < 1 or not compute_ratio >= 0 or not 0 < efficiency <= 1:
        raise ValueError(f"k = {k}, compute_ratio = {compute_ratio}, efficiency = {efficiency}")
    return (1 - efficiency / k) / (1 + compute_ratio)


def required_efficiency(reduction: float, k: int, compute_ratio: float) -> float:
    """Return the parameter server's efficiency at which BML shortens a job by `reduction`.

    Raises
    ------
    ValueError
        If no efficiency of at most 1 does.

    Examples
    --------
    >>> round(required_efficiency(0.564, 2, 0.0), 3)
    0.872
    """
    efficiency = k * (1 - reduction * (1 + compute_ratio))
    if not 0 < efficiency <= 1:
        raise ValueError(
            f"reduction = {reduction:g} at k = {k}, c = {compute_ratio:g}: needs an efficiency of "
            f"{efficiency:g}, which is not in (0, 1]"
        )
    return efficiency
