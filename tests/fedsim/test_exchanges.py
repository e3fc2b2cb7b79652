"""Who exchanged with whom: read from records, judged, and drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedsim.recorder import Recorder, RoundRow, TransferRow
from fedsim.report.exchanges import exchanges_of, picture, places, svg
from fedsim.report.html import render_page
from fedsim.report.plots import write_plots
from fedsim.results import load_run

ROUNDS = {
    1: [(0, 1, "delivered"), (1, 0, "delivered"), (2, 3, "delivered"), (3, 2, "lost")],
    2: [(1, 2, "delivered"), (2, 1, "delivered"), (3, 0, "delivered"), (0, 3, "delivered")],
    4: [(0, 1, "failed"), (1, 0, "lost"), (2, 3, "delivered"), (3, 2, "delivered")],
}


def write_run(directory: Path, histories: dict[str, dict], devices: int = 5) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    world = {"name": "x", "strategies": list(histories), "devices": {"count": devices}}
    (directory / "world.json").write_text(json.dumps(world))
    for name, rounds in histories.items():
        with Recorder(directory, name, transfers=True) as recorder:
            message = 0
            for number, payloads in rounds.items():
                for source, destination, outcome in payloads:
                    recorder.transfer(
                        TransferRow(
                            round=number, message=message, kind="peer", source=source,
                            destination=destination, released=float(number), started=float(number),
                            first_byte=number + 0.1, finished=number + 0.5, size_bytes=100,
                            outcome=outcome, route=[f"{source}>{destination}"],
                        )
                    )  # fmt: skip
                    message += 1
                recorder.round(
                    RoundRow(round=number, virtual_time=number + 1.0, wall_time=0.0,
                             consensus_distance=8.0 / number, bytes_peer=100 * len(payloads))
                )  # fmt: skip
    return directory


def histories(tmp_path, rounds=ROUNDS, devices=5):
    return exchanges_of(load_run(write_run(tmp_path, {"a": rounds}, devices)))


def limits(**changes):
    return {"max_graphs": 8, "max_devices": 60, "max_lines": 1_000, "max_bins": 240} | changes


def test_partners_are_counted_by_what_arrived(tmp_path):
    (found,) = histories(tmp_path)
    assert found.rounds.tolist() == [1, 2, 4]
    assert found.partners().tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_a_drawing_tells_arrived_from_lost_and_names_the_lonely(tmp_path):
    (found,) = histories(tmp_path)
    first, second, last = picture(found, **limits()).drawings
    assert (first.round, first.arrived, first.lost) == (1, [(0, 1), (2, 3)], [])  # one way suffices
    assert first.alone == [2, 4]  # 2 was not heard by 3's payload, 4 has no links at all
    assert second.arrived == [(0, 3), (1, 2)]
    assert (last.round, last.arrived, last.lost) == (4, [(2, 3)], [(0, 1)])
    assert last.alone == [0, 1, 4]


def test_connectivity_counts_what_arrived_in_its_direction(tmp_path):
    (found,) = histories(tmp_path, devices=4)
    told = found.connectivity()
    assert (told.window, told.connected_share) == (2, 0.0)
    (lonely,) = histories(tmp_path / "five", devices=5)
    assert lonely.connectivity().window is None
    one_way = {n: [(i, (i + 1) % 4, "delivered") for i in range(3)] for n in (1, 2)}
    (line,) = histories(tmp_path / "line", one_way, devices=4)
    assert line.connectivity().window is None


def test_strategies_that_exchange_alike_share_a_picture(tmp_path):
    other = ROUNDS | {4: ROUNDS[4][2:]}
    run = load_run(write_run(tmp_path, {"a": ROUNDS, "b": other, "c": ROUNDS}))
    assert [one.strategies for one in exchanges_of(run)] == [["a", "c"], ["b"]]


def test_links_that_never_change_are_drawn_once(tmp_path):
    (found,) = histories(tmp_path, dict.fromkeys(range(1, 30), ROUNDS[1]))
    assert not found.changes()
    assert len(picture(found, **limits()).drawings) == 1
    assert len(picture(found, **limits()).bins) == 29


def test_a_picture_keeps_within_its_limits(tmp_path):
    everybody = [(a, b, "delivered") for a in range(40) for b in range(40) if a != b]
    rounds = {n: everybody[n:] for n in range(1, 31)}
    (found,) = histories(tmp_path, rounds, devices=40)
    drawn = picture(found, **limits(max_graphs=4, max_devices=30, max_bins=10))
    assert [drawing.round for drawing in drawn.drawings] == [1, 11, 20, 30]
    assert sum(len(drawing.arrived) for drawing in drawn.drawings) <= 1_000
    assert drawn.shown[0] == 0
    assert drawn.shown[-1] == 39
    assert drawn.bins[0] == (1, 3)
    assert drawn.bins[-1] == (28, 30)
    assert drawn.partners.shape == (len(drawn.shown), 10)
    heard = found.partners()[drawn.shown]
    assert drawn.partners == pytest.approx(heard.reshape(len(drawn.shown), 10, 3).mean(2))


def test_the_drawing_has_a_dot_a_device_and_a_line_a_pair(tmp_path):
    (found,) = histories(tmp_path)
    drawn = picture(found, **limits())
    text = svg(drawn.drawings[2], drawn.shown)
    assert text.count("<circle") == 5
    assert text.count('class="alone"') == 3
    assert re.findall(r'class="(came|lost)"', text) == ["came", "lost"]
    assert text.count("M") == 2
    assert np.hypot(*np.transpose(places(7))) == pytest.approx(1)


def test_the_page_and_the_plots_show_it_and_say_it(tmp_path):
    hostile = '<b>"'
    run = load_run(write_run(tmp_path, {"a": ROUNDS, hostile: {1: ROUNDS[1]}}, devices=4))
    page = render_page(run)
    assert "Who exchanged with whom" in page
    assert page.count('class="graphs"') == 2
    assert hostile not in page.split("<script>")[0]
    row = re.search(r'<th scope="row">a</th>(.*?)</tr>', page.split("exchanged with whom")[1])
    cells = re.findall("<td>(.*?)</td>", row.group(1))
    assert cells == ["0.75", "1", "25.0 %", "0.0 %", "2", "8", "2"]
    names = {path.name for path in write_plots(run, tmp_path / "plots")}
    assert {"exchanges_1.png", "exchanges_2.svg"} <= names


def test_a_run_by_way_of_a_server_has_no_such_section(tmp_path):
    with Recorder(tmp_path, "a", transfers=True) as recorder:
        recorder.round(RoundRow(round=1, virtual_time=1.0, wall_time=1.0, bytes_up=10))
    (tmp_path / "world.json").write_text("{}")
    run = load_run(tmp_path)
    assert exchanges_of(run) == []
    assert "Who exchanged" not in render_page(run)
