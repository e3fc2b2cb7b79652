import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_run import Sample, write_sample

from fedsim.errors import ScenarioError
from fedsim.report import html, page_data, series
from fedsim.report.html import render_page, write_report
from fedsim.results import load_run

HOSTILE = "<script>alert(\"1\")</script> & 'x' \u2028 $\\frac{"
TWELVE = tuple(f"strategy-{i}" for i in range(12))


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.attributes, self.texts, self.scripts = [], [], [], []
        self.in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data
        self.texts.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(autouse=True)
def small_library(request, monkeypatch):
    """Leave plotly's 4.8 MB out where a test is not about them."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(html, "get_plotlyjs", lambda: "/* </script> */")


@pytest.fixture
def whole():
    """Ask for the real library."""


def page_of(directory: Path, sample: Sample) -> Page:
    return Page(render_page(load_run(write_sample(directory, sample))))


def test_the_page_is_whole_small_and_asks_nobody(tmp_path, whole):
    text = render_page(load_run(write_sample(tmp_path, Sample(names=TWELVE, rounds=1_500))))
    assert 4e6 < len(text.encode()) < 6e6
    library = max(re.findall(r"<script>.*?</script>", text, re.DOTALL), key=len)
    page = Page(text.replace(library, ""))
    assert not {tag for tag, *_ in page.attributes} & {"link", "img", "iframe", "object", "base"}
    assert not [a for a in page.attributes if a[1] in {"src", "href", "srcset", "action"}]
    assert "url(" not in html._asset("page.css")
    assert "@import" not in text.split("</style>")[0]


def test_only_the_scripts_written_here_may_run(tmp_path):
    page = page_of(tmp_path, Sample(rounds=2))
    policy = next(v for t, k, v in page.attributes if t == "meta" and v.startswith("default-src"))
    assert policy.startswith("default-src 'none';")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert len(page.scripts) == 3
    for digest, script in zip(allowed, page.scripts[1:], strict=True):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == digest
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]


def test_the_same_files_give_the_same_bytes_and_stay_as_they_are(tmp_path):
    write_sample(tmp_path, Sample(names=("a",), rounds=4, transfers=True))
    records = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert write_report(tmp_path) == tmp_path / "report.html"
    first = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write_report(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first
    assert {p: first[p] for p in records} == records
    new = {p.name for p in first if p not in records and p.parent == tmp_path}
    assert new == {"report.html"}


def test_every_string_of_the_scenario_is_escaped(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    sample = Sample(names=(name, "b"), title=HOSTILE, rounds=3, scenario="name: {name}\n<b>bold")
    page = page_of(tmp_path, sample)
    plain = page_of(tmp_path / "plain", Sample(names=("a", "b"), title="t", rounds=3, scenario="x"))
    assert sorted(page.elements) == sorted(plain.elements)
    texts = "".join(page.texts)
    assert texts.count(HOSTILE) >= 3
    assert "<b>bold" in texts
    assert page.data["strategies"][0]["name"] == name
    assert ("option", "value", "<b>") not in page.attributes


def test_hostile_words_in_the_world_and_in_records_are_escaped(tmp_path):
    write_sample(tmp_path, Sample(names=("a",), rounds=2))
    world = json.loads((tmp_path / "world.json").read_text())
    world["data"]["dataset"] = world["networks"][0]["topology"] = HOSTILE
    world["networks"][0]["measures"] = {HOSTILE: 1.5}
    (tmp_path / "world.json").write_text(json.dumps(world))
    rows = (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()
    rows = [json.dumps(json.loads(row) | {f"strategy.{HOSTILE}": 1.0}) for row in rows]
    (tmp_path / "a" / "rounds.jsonl").write_text("\n".join(rows))
    page = Page(render_page(load_run(tmp_path)))
    assert len(page.scripts) == 3
    assert {"key": f"strategy.{HOSTILE}", "label": HOSTILE} in page.data["measures"]
    assert "".join(page.texts).count(HOSTILE) >= 4


CASES = {
    "one": Sample(names=("fedavg",), rounds=3),
    "twelve": Sample(names=TWELVE, rounds=3),
    "diverged": Sample(rounds=8, diverged=("fedmedian",)),
    "all_diverged": Sample(rounds=8, diverged=Sample().names),
    "no_target": Sample(rounds=3, target=None),
    "no_rounds": Sample(rounds=0),
    "one_round": Sample(rounds=1, transfers=True),
    "interrupted": Sample(rounds=9, interrupted=("fedprox",), unstarted=("fedadam", "fedmedian")),
    "one_device": Sample(devices=1, rounds=3, transfers=True),
    "transfers": Sample(rounds=5, transfers=True),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_has_a_page(tmp_path, case):
    sample = CASES[case]
    page = page_of(tmp_path, sample)
    assert [s["name"] for s in page.data["strategies"]] == list(sample.names)
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert ("timeline" in ids) == sample.transfers
    assert "NaN" not in page.scripts[0]


def test_the_page_of_bare_records_has_curves_and_no_world(tmp_path):
    write_sample(tmp_path, Sample(rounds=3))
    for name in ("world.json", "summary.json", "scenario.yaml"):
        (tmp_path / name).unlink()
    page = Page(render_page(load_run(tmp_path)))
    assert "World" not in page.texts
    assert len(page.data["strategies"][0]["x"]["round"]) == 3


def test_a_directory_that_is_no_run_gets_no_files(tmp_path):
    with pytest.raises(ScenarioError, match="no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_answers_head_the_page(tmp_path):
    write_sample(tmp_path, Sample(rounds=40))
    run = load_run(tmp_path)
    texts = Page(render_page(run)).texts
    times = {n: r.summary["time_to_target"] for n, r in run.strategies.items()}
    at = texts.index("First at 90.0 % accuracy")
    assert texts[at + 1] == min((n for n in times if times[n]), key=lambda n: times[n])
    assert re.fullmatch(r" · \w+ takes \d\.\d\d × as long", texts[at + 3])


def test_thinned_curves_keep_the_last_round_and_the_target(tmp_path):
    run = load_run(write_sample(tmp_path, Sample(names=("a",), rounds=400, target=0.5)))
    [full], [thin] = series.curves(run), series.curves(run, max_points=20)
    assert len(thin.x["round"]) in {20, 21}
    assert thin.x["round"][-1] == 400
    assert full.x["round"][full.reached] == thin.x["round"][thin.reached]
    assert thin.y["eval_accuracy"][thin.reached] >= 0.5


def test_no_figure_grows_without_bound(tmp_path):
    sample = Sample(names=("a",), devices=8_000, rounds=1, transfers=True)
    data = page_of(tmp_path, sample).data
    assert len(data["split"]["devices"]) * 10 <= page_data._HEAT_CELLS
    assert len(data["devices"]["samples"]) <= page_data._SCATTER_POINTS
    assert len(data["strips"]["links"]) <= page_data._STRIP_LINKS
    assert sum(len(r["spans"]["row"]) for r in data["timelines"]["0"]) <= page_data._TIMELINE_SPANS


def test_many_rounds_are_thinned_to_what_a_page_can_hold(tmp_path):
    sample = Sample(names=TWELVE, rounds=700, devices=2)
    data = page_of(tmp_path, sample).data["strategies"]
    numbers = sum(len(v) for s in data for v in [*s["x"].values(), *s["y"].values()])
    assert 0.5 * page_data._CURVE_NUMBERS < numbers < 1.1 * page_data._CURVE_NUMBERS


def test_twelve_strategies_look_different():
    styles = [series.style_of(i) for i in range(12)]
    assert len({(s.light, s.dash) for s in styles}) == 12


def linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def contrast(a: str, b: str) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    lights = sorted(
        sum(w * c for w, c in zip(weights, linear(colour), strict=True)) for colour in (a, b)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_lines_stand_out_from_the_page_in_light_and_dark():
    css = html._asset("page.css")
    light, dark = re.findall(r"--surface: (#\w+)", css)[:2]
    for on_light, on_dark in series.COLOURS.items():
        assert contrast(on_light, light) >= 3
        assert contrast(on_dark, dark) >= 3


DEFICIENCIES = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def oklab(rgb: list[float]) -> list[float]:
    """Return the colour in Ottosson's uniform space."""
    to_cones = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))
    to_lab = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))
    cones = [max(0.0, value) ** (1 / 3) for value in times(to_cones, rgb)]
    return times(to_lab, cones)


def times(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_stay_apart_for_colour_blind_readers(deficiency, ground):
    colours = series.COLOURS.keys() if ground == "light" else series.COLOURS.values()
    seen = [oklab([min(1.0, max(0.0, c)) for c in times(DEFICIENCIES[deficiency], linear(colour))])
            for colour in colours]  # fmt: skip
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.08


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("case", ["transfers", "twelve", "no_rounds", "all_diverged", "one_device"])
def test_a_browser_draws_every_figure_without_complaint(tmp_path, case, whole):
    write_sample(tmp_path / "run", CASES[case])
    page = tmp_path / "page.html"
    page.write_text(render_page(load_run(tmp_path / "run")), "utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2400",
         "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    figures = [v for t, k, v in Page(page.read_text("utf-8")).attributes
               if (t, k) == ("div", "class") and v.startswith("chart")]  # fmt: skip
    assert len(re.findall(r'class="chart[^"]* js-plotly-plot"', done.stdout)) == len(figures)
    assert done.stdout.count('class="main-svg"') >= len(figures)


def test_a_network_that_nobody_waits_for_is_said_to_be_so(tmp_path):
    import fedsim
    from fedsim.scenario import Scenario

    mapping = {
        "rounds": 2,
        "data": {"devices": 4},
        "devices": {"speed": {"kind": "constant", "value": "1 samples/s"}},
        "record": {"transfers": True},
        "strategies": {"slow": "fedavg"},
    }
    fedsim.run(Scenario.from_mapping(mapping), tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "the network is not on the critical path of slow" in page
