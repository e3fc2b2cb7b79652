"""The report: one HTML page that opens from disk, needs no network, and shows recorded files only.

Decision: the page is whole in itself. plotly.js is inlined once, and a content security policy lets
the browser run the two scripts written here and load nothing, whatever a scenario's names contain.
The same files give the same bytes.
"""

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fedsim.recorder import dump_json
from fedsim.report import exchanges, page_data, series, timeline
from fedsim.report.tables import (
    COLUMNS,
    answers,
    comparison_rows,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    format_rate,
    format_significant,
    notes,
)
from fedsim.results import RunResult, load_run

__all__ = ["render_page", "write_report"]

_UNNOTICED = 0.01  # share of the virtual time below which the network does not matter

_NETWORK_FIGURES = 4
_LINK_ROWS = 8


def write_report(directory: Path) -> Path:
    """Rebuild `report.html` and `plots/` of a run from its files alone.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ScenarioError
        If `directory` is no run or its files are damaged.
    """
    from fedsim.report.plots import write_plots  # a worker that writes none needs no matplotlib

    run = load_run(directory)
    write_plots(run, directory / "plots")
    page = directory / "report.html"
    draft = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        draft.write_text(render_page(run), encoding="utf-8", newline="\n")
        draft.replace(page)
    finally:
        draft.unlink(missing_ok=True)
    return page


def render_page(run: RunResult) -> str:
    """Return the page as text."""
    recorded = timeline.timelines(run)
    found = exchanges.exchanges_of(run)
    drawn = page_data.pictures(found)
    data = _json(page_data.collect(run, recorded, drawn))
    library = _inline(get_plotlyjs())
    program = _inline(_asset("page.js"))
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        f"form-action 'none'; script-src {_digest(library)} {_digest(program)}"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.name)} – fedsim</title>",
            f"<style>\n{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            _header(run, recorded),
            "<main>",
            _comparison(run),
            _curves(run),
            _time(run, recorded),
            _exchanges(run, found, drawn),
            _world(run),
            _scenario(run),
            "</main>",
            _footer(run),
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{library}</script>",
            f"<script>{program}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    """Return a part of the page. It lies in Markdown: Flower packs no .js or .css into an app."""
    text = resources.files("fedsim.report").joinpath(f"{name}.md").read_text("utf-8")
    return text[text.index("\n") + 1 : text.rindex("```")]


def _inline(script: str) -> str:
    return script.replace("</script", "<\\/script").replace("\r\n", "\n")


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _json(value: Any) -> str:
    """Return JSON that cannot end its script element: no <, >, & in it."""
    text = dump_json(value)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---- sections ------------------------------------------------------------------------------------


def _header(run: RunResult, recorded: dict[str, timeline.Timeline]) -> str:
    world = run.world
    data, model, devices = (world.get(key) or {} for key in ("data", "model", "devices"))
    facts = [
        f"{format_count(devices['count'])} devices" if "count" in devices else "",
        data.get("dataset", ""),
        data.get("partition", ""),
        model.get("kind", ""),
        "" if run.seed is None else f"seed {run.seed}",
    ]
    line = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)
    cards = "".join(
        f'<div class="answer"><div class="question">{escape(a.question)}</div>'
        f'<div class="who">{escape(a.who)}</div>'
        f'<div class="how">{_joined(f"<b>{escape(a.value)}</b>" if a.value else "", a.how)}</div>'
        "</div>"
        for a in answers(run)
    )
    warned = notes(run) + timeline.timeline_notes(recorded)
    warnings = "".join(f"<li>{escape(note)}</li>" for note in warned)
    return (
        f'<header class="top"><div class="title"><div><h1>{escape(run.name)}</h1>'
        f'<p class="facts-line">{line}</p></div>'
        '<button id="theme" type="button" title="Light or dark">◐ <span>theme</span></button></div>'
        + (f'<div class="answers">{cards}</div>' if cards else "")
        + (f'<ul class="notes">{warnings}</ul>' if warnings else "")
        + "</header>"
    )


def _joined(strong: str, words: str) -> str:
    return " · ".join(part for part in (strong, escape(words)) if part)


def _swatch(style: series.Style) -> str:
    dash = f' stroke-dasharray="{" ".join(map(str, style.dash))}"' if style.dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true" '
        f'style="--light:{style.light};--dark:{style.dark}">'
        f'<line x1="0" y1="5" x2="26" y2="5"{dash}/></svg>'
    )


def _comparison(run: RunResult) -> str:
    rows = comparison_rows(run)
    if not rows:
        return "<h2>Comparison</h2><p>No strategies here.</p>"
    columns = [c for c in COLUMNS if all(c.key in row for row in rows.values())]
    if all(row["state"].value == "done" for row in rows.values()):
        columns = [c for c in columns if c.key != "state"]
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(text)}</button></th>'
        for text in ("strategy", *(c.heading for c in columns))
    )
    lines = []
    for index, (name, row) in enumerate(rows.items()):
        cells = []
        for column in columns:
            cell = row[column.key]
            exact = "" if cell.value is None else escape(str(cell.value))
            text = escape(cell.text)
            if column.key == "state":
                kind = "state" if cell.value == "done" else "state bad"
                text = f'<span class="{kind}">{text}</span>'
            mark = ' class="best"' if cell.is_best else ""
            cells.append(f'<td data-value="{exact}" title="{exact}"{mark}>{text}</td>')
        lines.append(
            f'<tr><th scope="row" data-value="{escape(name)}"><label class="switch">'
            f'<input type="checkbox" checked data-index="{index}">{_swatch(series.style_of(index))}'
            f"<span>{escape(name)}</span></label></th>{''.join(cells)}</tr>"
        )
    legend = (
        "★ the best of its column; point at a number for its exact value, click a heading to sort. "
        "Times are virtual; sizes are payloads, 1 kB = 1,000 bytes."
    )
    return (
        '<h2>Comparison</h2><div class="panel table scroll"><table id="comparison">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="quiet" style="margin-top:6px;font-size:12.5px">{legend}</p>'
    )


def _curves(run: RunResult) -> str:
    legend = "".join(
        f'<button type="button" aria-pressed="true" data-index="{index}">'
        f"{_swatch(series.style_of(index))}{escape(name)}</button>"
        for index, name in enumerate(run.strategies)
    )
    axes = "".join(
        f'<label><input type="radio" name="abscissa" value="{value}"'
        f"{' checked' if value == 'round' else ''}>{words}</label>"
        for value, words in (("round", "round"), ("time", "virtual time"), ("bytes", "traffic"))
    )
    choices = "".join(
        f'<option value="{escape(m["key"])}">{escape(m["label"])}</option>'
        for m in page_data.measures(run)
    )
    measure = (
        f'<select id="measure-choice" aria-label="measure">{choices}</select>'
        if choices
        else "<h3>Other measures</h3>"
    )
    log = '<label class="switch quiet"><input type="checkbox" id="log">logarithmic</label>'
    directions = (
        "<h3>Traffic, all rounds</h3>"
        '<span class="quiet">dark to light: from the server, to it, between devices</span>'
    )
    reset = '<button type="button" id="all">all</button>' if len(run.strategies) > 1 else ""
    return (
        '<h2>Curves</h2><div class="controls">'
        f'<span class="quiet">against</span><span class="segments">{axes}</span>'
        f'<span class="legend">{legend}{reset}</span></div><div class="grid">'
        + _chart("accuracy", "<h3>Accuracy</h3>", "accuracy of each strategy")
        + _chart("loss", f"<h3>Loss</h3>{log}", "loss of each strategy")
        + _chart("measure", measure, "the chosen measure of each strategy")
        + _chart("traffic", directions, "bytes sent in each direction")
        + "</div>"
    )


def _chart(name: str, head: str, label: str, kind: str = "panel") -> str:
    return (
        f'<section class="{kind}"><div class="head">{head}</div>'
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(label)}"></div></section>'
    )


def _time(run: RunResult, recorded: dict[str, timeline.Timeline]) -> str:
    """Return what rounds waited for, a timeline, links: where transfers were recorded."""
    if not recorded:
        return ""
    panels = [_wide(f"<h3>What rounds wait for</h3>{_shares(recorded)}", "table")]
    names = list(run.strategies)
    options = "".join(f'<option value="{names.index(n)}">{escape(n)}</option>' for n in recorded)
    selects = (
        "<h3>Timeline of a round</h3>"
        f'<span><select id="timeline-strategy" aria-label="strategy">{options}</select> '
        '<select id="timeline-round" aria-label="round"></select></span>'
    )
    key = (
        '<p class="quiet key"><i class="in"></i>receiving <i class="work"></i>local work '
        '<i class="out"></i>sending; outlined: the critical path, pale: lost or failed '
        '<span id="timeline-note"></span></p>'
    )
    figure = '<div class="chart" id="timeline" role="img" aria-label="timeline of a round"></div>'
    panels.append(_wide(f'<div class="head">{selects}</div>{key}{figure}'))
    states = page_data.strips(run)
    if states is not None:
        shown = len(states.links)
        count = f"{shown} of {states.changing}" if shown < states.changing else str(shown)
        head = f'<h3>Link states</h3><span class="quiet">{count} links that change</span>'
        panels.append(
            _wide(
                f'<div class="head">{head}</div><div class="chart" id="strips" role="img" '
                'aria-label="rate of each link over virtual time"></div>'
            )
        )
    links = _links(run, list(recorded))
    if links:
        panels.append(_wide(f"<h3>Most used links</h3>{links}", "table"))
    return f'<h2>Time</h2><div class="grid">{"".join(panels)}</div>'


def _wide(content: str, kind: str = "") -> str:
    return f'<section class="panel wide {kind}">{content}</section>'


def _table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return a table of texts; each row comes with the attributes of its element."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "".join(
        f'<tr{attributes}><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in rest)
        + "</tr>"
        for attributes, (first, *rest) in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _shares(recorded: dict[str, timeline.Timeline]) -> str:
    headings = (
        "strategy",
        "network",
        "local work",
        "waiting",
        "usual last device",
        "usual tightest link",
    )
    idle = [escape(name) for name, r in recorded.items() if r.share.network < _UNNOTICED]
    warning = (
        f'<p class="quiet">Warning: the network is not on the critical path of {", ".join(idle)}: '
        "another network would not change their times.</p>"
    )
    return (warning if idle else "") + _table(
        headings,
        (
            (
                "",
                (
                    name,
                    *map(format_percent, (r.share.network, r.share.compute, r.share.waiting)),
                    "–" if r.share.device is None else str(r.share.device),
                    r.share.link or "–",
                ),
            )
            for name, r in recorded.items()
        ),
    )


def _links(run: RunResult, names: Sequence[str]) -> str:
    rows = []
    for index, (name, result) in enumerate(run.strategies.items()):
        if name in names:
            for use in timeline.link_uses(result)[:_LINK_ROWS]:
                cells = (
                    use.link,
                    name,
                    format_rate(use.bandwidth_bps),
                    format_duration(use.latency),
                    format_bytes(use.carried_bytes),
                    format_percent(use.busy),
                    format_percent(use.utilisation),
                )
                rows.append((f' data-strategy="{index}"', cells))
    headings = ("link", "strategy", "rate", "latency", "carried", "busy", "utilisation")
    return _table(headings, rows) if rows else ""


def _exchanges(
    run: RunResult,
    found: Sequence[exchanges.Exchanges],
    drawn: Sequence[exchanges.Picture],
) -> str:
    """Return who exchanged with whom: where transfers between devices were recorded."""
    if not found:
        return ""
    options = "".join(
        f'<option value="{k}">{escape(", ".join(one.strategies))}</option>'
        for k, one in enumerate(found)
    )
    head = (
        "<h3>The graph over time</h3>"
        f'<select id="partners-choice" aria-label="strategies">{options}</select>'
    )
    key = (
        '<p class="quiet key"><i class="came"></i>a payload arrived, one way or both '
        '<i class="lost"></i>none did <i class="alone"></i>heard from nobody</p>'
    )
    graphs = "".join(
        _small_multiples(k, *pair) for k, pair in enumerate(zip(found, drawn, strict=True))
    )
    figure = (
        '<h3>Devices that each one heard from, round by round</h3><div class="chart" '
        'id="partners" role="img" aria-label="how many devices each device heard from"></div>'
    )
    return (
        '<h2>Who exchanged with whom</h2><div class="grid">'
        + _wide(_connectivity(run, found), "table")
        + _wide(f'<div class="head">{head}</div>{key}{graphs}{figure}')
        + "</div>"
    )


def _small_multiples(index: int, one: exchanges.Exchanges, picture: exchanges.Picture) -> str:
    figures = "".join(
        f"<figure>{exchanges.svg(drawing, picture.shown)}"
        f"<figcaption>round {drawing.round}</figcaption></figure>"
        for drawing in picture.drawings
    )
    shown, hidden = len(picture.shown), "" if index == 0 else " hidden"
    few = f"{shown} of {one.devices:,} devices are drawn" if shown < one.devices else ""
    same = "every round has these links" if len(picture.drawings) == 1 < len(one.rounds) else ""
    note = "; ".join(filter(None, (few, same)))
    return (
        f'<div class="graphs" data-history="{index}"{hidden}>{figures}'
        + (f'<p class="quiet">{note}</p>' if note else "")
        + "</div>"
    )


def _connectivity(run: RunResult, found: Sequence[exchanges.Exchanges]) -> str:
    rows = []
    for one in found:
        told, heard = one.connectivity(), one.partners()
        lost = format_percent(1 - float(one.arrived.mean()))
        window = "–" if told is None else str(told.window or "never")
        share = "–" if told is None else format_percent(told.connected_share)
        for name in one.strategies:
            apart = [row.consensus_distance for row in run.strategies[name].rounds]
            known = [value for value in apart if value is not None]
            ends = [format_significant(known[i]) for i in (0, -1)] if known else ["–", "–"]
            figures = [format_significant(v) for v in (heard.mean(), (heard == 0).sum(0).mean())]
            rows.append(("", (name, *figures, lost, share, window, *ends)))
    headings = (
        "strategy",
        "heard from, a device and round",
        "devices that heard from nobody, a round",
        "payloads lost",
        "rounds that connect all",
        "B: this many in a row always connect all",
        "consensus distance, first round",
        "last round",
    )
    return _table(headings, rows)


def _world(run: RunResult) -> str:
    world = run.world
    if not world:
        return ""
    devices = series.devices_of(run)
    facts = '<section class="panel"><h3>{}</h3>{}</section>'
    panels = []
    if devices.get("label_counts"):
        panels.append(
            _chart("split", "<h3>Who holds what</h3>", "samples of each class on each device")
        )
    if page_data.has_device_figure(devices):
        panels.append(_chart("devices", "<h3>Devices</h3>", "samples and speed of each device"))
    panels.append(facts.format("Data and model", _facts(_data_facts(run))))
    for index, network in enumerate(world.get("networks", ())):
        title = escape(series.network_title(run, network))
        panels.append(facts.format(f"Network: {title}", _facts(_network_facts(network))))
        if index < _NETWORK_FIGURES and page_data.has_network_figure(network):
            head = f"<h3>Access links: {title}</h3>"
            panels.append(_chart(f"network-{index}", head, "access rate of each device"))
    return f'<h2>World</h2><div class="grid filled">{"".join(panels)}</div>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v)
    return f"<dl>{rows}</dl>"


def _span(values: Sequence[float | None] | None, text: Any) -> str:
    """Return the range of values in words: one value, or smallest, median and largest."""
    if not values:
        return ""
    ordered = sorted(float("inf") if v is None else v for v in values)
    if ordered[0] == ordered[-1]:
        return f"{text(ordered[0])}, all alike"
    least, median, most = (text(ordered[i]) for i in (0, len(ordered) // 2, -1))
    return f"{least} to {most}, median {median}"


def _speed(rate: float) -> str:
    return "unlimited" if rate == float("inf") else f"{float(f'{rate:.3g}'):,.6g} samples/s"


def _data_facts(run: RunResult) -> list[tuple[str, str]]:
    data, model = (run.world.get(key) or {} for key in ("data", "model"))
    devices = series.devices_of(run)
    listed, count = len(devices.get("listed", ())), devices.get("count")
    return [
        ("data set", str(data.get("dataset", ""))),
        ("split over devices", str(data.get("partition", ""))),
        ("training samples", format_count(data.get("train_samples"))),
        ("test samples", format_count(data.get("test_samples"))),
        ("samples a device", _span(devices.get("samples"), lambda v: format_count(int(v)))),
        ("model", str(model.get("kind", ""))),
        ("parameters", format_count(model.get("parameters"))),
        ("payload of the model", format_bytes(model.get("size_bytes"))),
        ("device speed", _span(devices.get("speed_samples_per_s"), _speed)),
        ("availability", str(devices.get("availability", ""))),
        ("shown", f"{listed:,} of {count:,} devices" if count and listed < count else ""),
    ]


def _network_facts(network: dict[str, Any]) -> list[tuple[str, str]]:
    shared = [
        f"{words} {format_rate(network.get(key))}"
        for key, words in (("server_uplink_bps", "uploads"), ("server_downlink_bps", "downloads"))
    ]
    return [
        ("topology", str(network.get("topology", ""))),
        ("switches", format_count(network.get("switches") or None).strip("–")),
        ("servers", format_count(network.get("servers") or None).strip("–")),
        ("links", format_count(network.get("links") or None).strip("–")),
        ("device to server", _span(network.get("uplink_bps"), format_rate)),
        ("server to device", _span(network.get("downlink_bps"), format_rate)),
        ("shared at the server", ", ".join(shared) if network.get("servers") else ""),
        ("latency, one way", _span(network.get("latency_s"), format_duration)),
        ("link rates", _span(network.get("link_bps"), format_rate)),
        ("link latencies", _span(network.get("link_latency_s"), format_duration)),
        ("links over time", str(network.get("variation", ""))),
        ("message loss", format_percent(network.get("message_loss"))),
        *((str(k).replace("_", " "), format_significant(v)) for k, v in _measured(network)),
    ]


def _measured(network: dict[str, Any]) -> list[tuple[str, float]]:
    return [(k, v) for k, v in (network.get("measures") or {}).items() if v is not None]


def _scenario(run: RunResult) -> str:
    if not run.scenario:
        return ""
    return (
        "<details><summary>Scenario, with every default filled in</summary>"
        f'<pre tabindex="0">{escape(run.scenario)}</pre></details>'
    )


def _footer(run: RunResult) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    spent = sum(result.summary.get("wall_time") or 0.0 for result in run.strategies.values())
    return (
        f"<footer><p>{escape(versions)}</p><p>Simulated in {format_duration(spent)} of wall time, "
        "all strategies together. The numbers are in summary.json and NAME/rounds.jsonl, the "
        "figures as PNG and SVG in plots/, beside this page.</p>"
        "<noscript><p>The figures of this page need JavaScript.</p></noscript></footer>"
    )
