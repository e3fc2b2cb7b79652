"""Groups of devices that run collectives on a grid, for tests."""

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.whatif import time_schedule
from tests.fedsim.worlds import make_world
from topologies.attributes import devices_of
from topologies.overlap import iteration_time
from topologies.placement import COLLECTIVES
from topologies.routing import Router
from topologies.timing import CostModel, LoadPlan

SIZE = 61_706 * 4  # bytes of a LeNet-5
RATE = 1e9  # bit/s
ALPHA = 20e-6


def collective_world(graph, **options):
    """Return a grid on a graph, its devices working 4 samples/s, 4 samples an instruction."""
    options.setdefault("speed", 4.0)
    return make_world(len(devices_of(graph)), graph=graph, **options)


def asks(world, devices=None, number=1, size=SIZE, config=None, **exchange):
    """Return one instruction a device: 4 samples of work, then the collective."""
    devices = range(len(world.grid.fleet)) if devices is None else devices
    arrays = world.initial()
    sent = []
    for place, device in enumerate(devices):
        own = size[place] if isinstance(size, list) else size
        known = {} if own is None else {"payload_bytes": own}
        record = ConfigRecord({"kind": "collective"} | known | exchange)
        work = {"server-round": number, "local-steps": 1, "batch-size": 4} | (config or {})
        content = {"arrays": arrays, "config": ConfigRecord(work), "exchange": record}
        sent.append(Message(RecordDict(content), dst_node_id=1000 + device, message_type="train"))
    return sent


def run(world, devices=None, **options):
    """Run one collective; return the replies and what its time went into."""
    replies = world.grid.send_and_receive(asks(world, devices, **options))
    return replies, world.grid.take_traffic().collectives


def expected(graph, name, size=SIZE, alpha=ALPHA, **options):
    """Return the seconds that the what-if study gives."""
    plan = LoadPlan(COLLECTIVES[name](graph), Router(graph))
    model = CostModel(step_latency=alpha)
    return time_schedule(plan, size, model=model, **options).seconds


def expected_iteration(graph, name, layers, compute, fusion_bytes, *, overlap):
    """Return an iteration of the what-if study."""
    return iteration_time(
        layers,
        lambda size, _: expected(graph, name, size),
        compute=compute,
        fusion_bytes=fusion_bytes,
        overlap=overlap,
    )


def finished(replies):
    """Return when each device was done, in the order of the replies."""
    return np.array([reply.content["delivery"]["finished"] for reply in replies])


def pull_all(world, ids):
    """Return device → (time at which its reply is available, reply), in order of time."""
    found, ids = {}, list(ids)
    while ids:
        for reply in world.grid.pull_messages(ids):
            found[reply.metadata.src_node_id - 1000] = (world.grid.now, reply)
            ids.remove(reply.metadata.reply_to_message_id)
        ids = [i for i in ids if not world.grid.is_lost(i)]
    return found
