import struct
from xml.etree import ElementTree

import pytest
from sample_run import Sample, write_sample

from fedsim.recorder import RoundRow, summarise
from fedsim.report.plots import write_plots
from fedsim.results import RunResult, StrategyResult, load_run


def plots_of(tmp_path, sample: Sample):
    run = load_run(write_sample(tmp_path / "run", sample))
    return write_plots(run, tmp_path / "plots")


def test_every_figure_is_a_png_and_an_svg(tmp_path):
    written = plots_of(tmp_path, Sample(names=("a", "b"), rounds=3, transfers=True))
    stems = {path.stem for path in written}
    assert stems == {
        "accuracy_by_round", "accuracy_by_time", "accuracy_by_traffic", "loss_by_round",
        "loss_by_time", "loss_by_traffic", "traffic", "data_split", "devices", "network",
        "link_states", "timeline_1", "timeline_2",
    }  # fmt: skip
    assert {(tmp_path / "plots" / f"{s}.{kind}") for s in stems for kind in ("png", "svg")} == set(
        written
    )
    for path in written:
        if path.suffix == ".png":
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert (width, height) == (960, 600)
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "sample",
    [
        Sample(rounds=0),
        Sample(names=("a",), rounds=1, devices=1, target=None),
        Sample(names=("a", "b"), rounds=8, diverged=("a",)),
        Sample(rounds=3, names=tuple(f"strategy-{i}" for i in range(12))),
    ],
    ids=["no rounds", "one point", "diverged", "twelve"],
)
def test_every_kind_of_run_can_be_drawn(tmp_path, sample):
    written = plots_of(tmp_path, sample)
    assert all(path.stat().st_size > 1000 for path in written)
    assert ("loss_by_time" in {p.stem for p in written}) == (sample.rounds > 0)


def run_of(*names: str, **values) -> RunResult:
    rows = [RoundRow(round=1, virtual_time=1.0, wall_time=1.0, bytes_up=10, **values)]
    return RunResult("x", 1, {n: StrategyResult(n, summarise(rows), rows) for n in names})


def test_names_are_drawn_as_they_are(tmp_path):
    names = ("$\\frac{1}{", "_hidden", "<script>&", "ü" * 60)
    write_plots(run_of(*names, eval_accuracy=0.5), tmp_path)
    texts = "".join(ElementTree.parse(tmp_path / "accuracy_by_round.svg").getroot().itertext())
    for name in (*names[:3], "ü" * 31 + "…"):
        assert name in texts


def test_figures_of_an_earlier_report_are_removed_and_other_files_kept(tmp_path):
    (tmp_path / "timeline_9.png").touch()
    (tmp_path / "notes.txt").touch()
    written = write_plots(run_of("a"), tmp_path)
    assert set(tmp_path.iterdir()) == {*written, tmp_path / "notes.txt"}


def test_a_run_without_evaluation_has_no_accuracy_figure(tmp_path):
    assert {path.stem for path in write_plots(run_of("a", train_loss=1.0), tmp_path)} == {"traffic"}
