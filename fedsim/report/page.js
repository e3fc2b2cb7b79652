"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const narrow = window.matchMedia("(max-width: 520px)");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const view = { x: "round", log: false, measure: data.measures[0]?.key, off: new Set() };

  const byId = (id) => document.getElementById(id);
  const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const colourOf = (s) => (isDark() ? s.dark : s.light);
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // Plotly reads a little HTML in its texts; names are texts and nothing else.
  const plain = (text) =>
    String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const isOn = (s) => !view.off.has(s.name);

  // ---- units -----------------------------------------------------------------------------------
  const digits = (value) => String(Number(value.toPrecision(3)));
  const bytes = (n) => {
    const step = n < 1 ? 0 : Math.min(5, Math.floor(Math.log10(n) / 3 + 1e-9));
    return `${digits(n / 1000 ** step)} ${["B", "kB", "MB", "GB", "TB", "PB"][step]}`;
  };
  const two = (n) => String(n).padStart(2, "0");
  const duration = (t) => {
    if (t < 59.95) return t >= 1 || t === 0 ? `${digits(t)} s` : `${digits(t * 1000)} ms`;
    const s = Math.round(t);
    if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
    const m = Math.round(t / 60);
    if (m < 1440) return `${Math.floor(m / 60)} h ${two(m % 60)} min`;
    const h = Math.round(t / 3600);
    return `${Math.floor(h / 24)} d ${two(h % 24)} h`;
  };
  const rate = (bps) => {
    const step = Math.max(0, Math.min(4, Math.floor(Math.log10(bps) / 3 + 1e-9)));
    return `${digits(bps / 1000 ** step)} ${["", "k", "M", "G", "T"][step]}bit/s`;
  };
  const timeUnit = (longest) =>
    longest < 300 ? [1, "s"] : longest < 3 * 3600 ? [60, "min"]
    : longest < 4 * 86400 ? [3600, "h"] : [86400, "d"];
  const byteUnit = (most) => {
    const step = most < 1 ? 0 : Math.min(5, Math.floor(Math.log10(most) / 3));
    return [1000 ** step, ["B", "kB", "MB", "GB", "TB", "PB"][step]];
  };
  const largest = (lists) => lists.flat().reduce((a, b) => (b > a ? b : a), 0);

  // ---- drawing ---------------------------------------------------------------------------------
  const axis = (more) => ({
    gridcolor: variable("--grid"), linecolor: variable("--line"), zerolinecolor: variable("--line"),
    tickfont: { size: 11.5, color: variable("--quiet") }, automargin: true, ...more,
    title: { text: more.title ?? "", font: { size: 12, color: variable("--quiet") }, standoff: 8 },
  });
  const layout = (more) => ({
    margin: { l: 46, r: 12, t: 10, b: 40 }, showlegend: false, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: variable("--sans"), size: 12, color: variable("--ink") },
    hoverlabel: {
      bgcolor: variable("--surface"), bordercolor: variable("--line"),
      font: { color: variable("--ink"), size: 12, family: variable("--sans") }, namelength: -1,
      align: "left",
    },
    dragmode: narrow.matches ? false : "zoom", ...more,
  });
  const draw = (id, traces, more) => {
    const box = byId(id);
    if (!box) return;
    const full = layout(more);
    if (!traces.length) {
      full.annotations = [{ text: "nothing recorded", showarrow: false, xref: "paper", yref: "paper",
        x: 0.5, y: 0.5, font: { color: variable("--quiet") } }];
      full.shapes = [];
      full.xaxis = { visible: false };
      full.yaxis = { visible: false };
    }
    Plotly.react(box, traces, full, {
      responsive: true, displaylogo: false, displayModeBar: false,
    });
  };

  // ---- curves ----------------------------------------------------------------------------------
  const abscissa = () => {
    const longest = largest(data.strategies.map((s) => s.x[view.x]));
    if (view.x === "time") {
      const [scale, unit] = timeUnit(longest);
      return { scale, title: `virtual time (${unit})` };
    }
    if (view.x === "bytes") {
      const [scale, unit] = byteUnit(longest);
      return { scale, title: `traffic since the start (${unit})` };
    }
    return { scale: 1, title: "round", dtick: longest <= 10 ? 1 : undefined };
  };
  const where = (s, i) => {
    const parts = [`round ${s.x.round[i]}`, duration(s.x.time[i]), bytes(s.x.bytes[i])];
    return parts.join(" · ");
  };
  // A curve that explodes must not flatten the others.
  const rangeOf = (key, log) => {
    const shown = data.strategies.filter((s) => isOn(s) && s.y[key]);
    if (!shown.some((s) => s.state === "diverged")) return undefined;
    const values = shown.filter((s) => s.state !== "diverged").flatMap((s) => s.y[key])
      .filter((v) => v !== null && (!log || v > 0));
    if (!values.length) return undefined;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) return [Math.log10(low) - 0.1, Math.log10(high) + 0.2];
    return [Math.min(0, low), high + 0.08 * (high - low || 1)];
  };
  const spansDecades = (key) => {
    const shown = data.strategies.filter((s) => isOn(s) && s.state !== "diverged");
    const values = shown.flatMap((s) => s.y[key] ?? []).filter((v) => v > 0);
    return values.length ? Math.log10(largest(values) / Math.min(...values)) : 0;
  };
  const drawCurves = (id, key, options) => {
    const x = abscissa();
    const along = (s) => s.x[view.x].map((v) => v / x.scale);
    const traces = [];
    for (const s of data.strategies.filter((s) => isOn(s) && s.y[key])) {
      const line = { color: colourOf(s), width: 2, dash: s.dash };
      const points = s.y[key].filter((v) => v !== null).length;
      if (options.band && s.y[options.band]) {
        const ends = [1, -1].map((sign) =>
          s.y[key].map((v, i) => (v === null ? null : v + sign * (s.y[options.band][i] ?? 0))));
        const keep = ends[0].map((v, i) => i).filter((i) => ends[0][i] !== null);
        traces.push({
          type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", hoverinfo: "skip",
          fillcolor: colourOf(s) + "22",
          x: [...keep, ...keep.slice().reverse()].map((i) => along(s)[i]),
          y: [...keep.map((i) => ends[0][i]), ...keep.slice().reverse().map((i) => ends[1][i])],
        });
      }
      traces.push({
        type: "scatter", mode: points > 1 ? "lines" : "markers", name: plain(s.name),
        x: along(s), y: s.y[key], line, marker: { color: line.color, size: 7 }, connectgaps: true,
        text: s.x.round.map((_, i) => where(s, i)),
        hovertemplate: `<b>%{y:${options.format}}</b>  %{text}<extra>${plain(s.name)}</extra>`,
      });
      if (options.reached && s.reached !== null) {
        traces.push({
          type: "scatter", mode: "markers", hoverinfo: "skip",
          x: [along(s)[s.reached]], y: [s.y[key][s.reached]],
          marker: { size: 9, color: variable("--surface"), line: { color: line.color, width: 2.5 } },
        });
      }
    }
    const log = options.log && view.log;
    const shapes = [], annotations = [];
    if (options.reached && data.target !== null) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target,
        line: { color: variable("--quiet"), width: 1, dash: "2px,3px" } });
      annotations.push({ xref: "paper", x: 0, y: data.target, xanchor: "left", yanchor: "bottom",
        showarrow: false, text: `target ${digits(100 * data.target)} %`,
        font: { size: 11, color: variable("--quiet") } });
    }
    draw(id, traces, {
      xaxis: axis({ title: x.title, dtick: x.dtick, rangemode: "tozero", showgrid: false, ticks: "outside",
        tickcolor: variable("--line"), ticklen: 4 }),
      yaxis: axis({ tickformat: options.ticks, range: rangeOf(key, log),
        autorangeoptions: options.clip,
        ...(log ? { type: "log", dtick: spansDecades(key) < 3 ? "D2" : 1 } : {}) }),
      shapes, annotations,
    });
  };
  const drawTraffic = () => {
    const shown = data.strategies.filter(isOn);
    const [scale, unit] = byteUnit(largest(shown.map((s) => s.traffic.reduce((a, b) => a + b, 0))));
    const kinds = [["from the server", 1], ["to the server", 0.6], ["between devices", 0.3]];
    const traces = kinds.map(([kind, opacity], k) => ({
      type: "bar", orientation: "h", name: kind,
      y: shown.map((_, i) => i), x: shown.map((s) => s.traffic[k] / scale),
      marker: { color: shown.map(colourOf), opacity, line: { width: 0 } },
      text: shown.map((s) => bytes(s.traffic[k])), textposition: "none",
      hovertemplate: shown.map((s) => `<b>%{text}</b> ${kind}<extra>${plain(s.name)}</extra>`),
    })).filter((trace) => trace.x.some((v) => v > 0));
    draw("traffic", traces, {
      barmode: "stack", bargap: 0.35,
      xaxis: axis({ title: `payload (${unit})` }),
      yaxis: axis({ range: [Math.max(shown.length, 4) - 0.5, -0.5], showgrid: false, zeroline: false,
        tickvals: shown.map((_, i) => i),
        ticktext: shown.map((s) => plain(s.name.length > 18 ? s.name.slice(0, 17) + "…" : s.name)) }),
    });
  };
  const drawMeasures = () => {
    drawCurves("accuracy", "eval_accuracy",
      { format: ".1%", ticks: ".0%", band: "accuracy_std", reached: true,
        clip: { clipmin: 0, clipmax: 1.01 } });
    drawCurves("loss", "eval_loss", { format: ".4~g", ticks: "~g", log: true });
    const sound = data.strategies.filter((s) => s.state !== "diverged");
    const most = largest(sound.map((s) => s.y[view.measure] ?? []));
    drawCurves("measure", view.measure, { format: ".4~g", ticks: most < 1000 ? "~g" : "~s" });
    drawTraffic();
  };

  // ---- world -----------------------------------------------------------------------------------
  const heat = () => [[0, variable("--heat-0")], [0.5, variable("--heat-1")], [1, variable("--heat-2")]];
  const drawWorld = () => {
    const { split, devices, networks } = data;
    if (split) {
      const gap = split.devices.length * split.counts.length > 4000 ? 0 : 1;
      draw("split", [{
        type: "heatmap", z: split.counts, x: split.devices.map(String), xgap: gap, ygap: gap,
        y: split.counts.map((_, c) => String(c)), colorscale: heat(), zmin: 0,
        colorbar: { thickness: 8, outlinewidth: 0, tickfont: { size: 11, color: variable("--quiet") } },
        hovertemplate: "device %{x}, class %{y}: <b>%{z}</b> samples<extra></extra>",
      }], {
        xaxis: axis({ title: "device", type: "category", showgrid: false, nticks: 20, tickangle: 0 }),
        yaxis: axis({ title: "class", type: "category", showgrid: false, nticks: 20 }),
      });
    }
    if (devices) {
      draw("devices", [{
        type: "scatter", mode: "markers", x: devices.samples, y: devices.speed,
        text: devices.listed.map((d, i) => `device ${d}: <b>${devices.samples[i]} samples</b> at ` +
          `${digits(devices.speed[i] ?? 0)} samples/s, ` +
          `${duration(devices.samples[i] / (devices.speed[i] || Infinity))} an epoch`),
        hovertemplate: "%{text}<extra></extra>",
        marker: { color: variable("--accent"), size: devices.listed.length > 300 ? 4 : 8, opacity: 0.75 },
      }], {
        xaxis: axis({ title: "training samples", rangemode: "tozero" }),
        yaxis: axis({ title: "speed (samples/s)", type: "log", tickformat: "~s", dtick: "D2" }),
      });
    }
    networks.forEach((network, k) => {
      const traces = [];
      const sides = [["up", "device to server", "--accent", "circle"],
        ["down", "server to device", "--down", "diamond-open"]];
      for (const [side, words, colour, symbol] of sides) {
        if (!network[side]) continue;
        const order = network[side].map((_, i) => i)
          .sort((a, b) => (network[side][a] ?? Infinity) - (network[side][b] ?? Infinity));
        traces.push({
          type: "scatter", mode: "markers", name: words, x: order.map((_, i) => i + 1),
          y: order.map((i) => network[side][i]),
          marker: { color: variable(colour), size: order.length > 300 ? 4 : 8, symbol },
          text: order.map((i) => `device ${network.listed[i]}, ${words}: ` +
            `<b>${network[side][i] === null ? "unlimited" : rate(network[side][i])}</b>` +
            (network.latency ? `, latency ${duration(network.latency[i])}` : "")),
          hovertemplate: "%{text}<extra></extra>",
        });
      }
      draw(`network-${k}`, traces, {
        showlegend: true, legend: { orientation: "h", x: 0, y: 1.12, font: { size: 11.5 } },
        xaxis: axis({ title: "devices, slowest link first", showgrid: false }),
        yaxis: axis({ title: "access rate (bit/s)", type: "log", tickformat: "~s", dtick: "D2" }),
      });
    });
  };

  // ---- time ------------------------------------------------------------------------------------
  const tall = (id, rows) => {
    byId(id).style.height = `${Math.max(170, Math.min(760, 70 + 17 * rows))}px`;
  };
  const drawTimeline = () => {
    const round = data.timelines[byId("timeline-strategy")?.value]?.[byId("timeline-round").value];
    if (!round) return;
    const [scale, unit] = timeUnit(round.length);
    const colours = { in: variable("--in"), work: variable("--work"), out: variable("--out") };
    const all = round.spans;
    const traces = Object.keys(colours).map((side) => {
      const own = all.side.map((_, i) => i).filter((i) => all.side[i] === side);
      return {
        type: "bar", orientation: "h", name: side, y: own.map((i) => all.row[i]),
        base: own.map((i) => all.start[i] / scale), x: own.map((i) => all.length[i] / scale),
        marker: {
          color: colours[side], opacity: own.map((i) => (all.arrived[i] ? 0.9 : 0.35)),
          line: { color: variable("--ink"), width: own.map((i) => (all.critical[i] ? 1.6 : 0)) },
        },
        text: own.map((i) => `${plain(round.rows[all.row[i]])}: ` +
          `<b>${plain(round.labels[all.label[i]])}</b>, ${duration(all.length[i])}`),
        textposition: "none", hovertemplate: "%{text}<extra></extra>",
      };
    }).filter((trace) => trace.y.length);
    byId("timeline-note").textContent = round.note;
    tall("timeline", round.rows.length);
    const edge = (at) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: at, x1: at,
      line: { color: variable("--quiet"), width: 1, dash: "2px,3px" } });
    draw("timeline", traces, {
      barmode: "overlay", bargap: 0.3, shapes: [edge(0), edge(round.length / scale)],
      margin: { l: 60, r: 12, t: 6, b: 40 },
      xaxis: axis({ title: `virtual time since the round began (${unit})` }),
      yaxis: axis({ autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: round.rows.map((_, i) => i), ticktext: round.rows.map(plain) }),
    });
  };
  const offerRounds = () => {
    const chosen = byId("timeline-strategy");
    if (!chosen) return;
    byId("timeline-round").replaceChildren(...data.timelines[chosen.value].map((round, i) =>
      new Option(round.title, String(i))));
    for (const row of document.querySelectorAll("tr[data-strategy]")) {
      row.hidden = row.dataset.strategy !== chosen.value;
    }
    drawTimeline();
  };
  byId("timeline-strategy")?.addEventListener("change", offerRounds);
  byId("timeline-round")?.addEventListener("change", drawTimeline);
  const drawStrips = () => {
    const { strips } = data;
    if (!strips) return;
    const [scale, unit] = timeUnit(strips.until);
    const bins = strips.level[0].length;
    tall("strips", strips.links.length);
    draw("strips", [{
      type: "heatmap", z: strips.level, zmin: 0, zmax: 1, ygap: 2,
      x: strips.level[0].map((_, i) => ((i + 0.5) * strips.until) / bins / scale),
      y: strips.links.map((_, i) => i), customdata: strips.links.map((name) =>
        Array(bins).fill(plain(name))),
      colorscale: [[0, variable("--strip-0")], [1, variable("--strip-1")]],
      colorbar: { thickness: 8, outlinewidth: 0, tickformat: ".0%", tickvals: [0, 0.5, 1],
        tickfont: { size: 11, color: variable("--quiet") } },
      hovertemplate: `%{customdata}: <b>%{z:.0%}</b> of its best rate, %{x:.4~g} ${unit}<extra></extra>`,
    }], {
      margin: { l: 60, r: 12, t: 6, b: 40 },
      xaxis: axis({ title: `virtual time (${unit})`, showgrid: false }),
      yaxis: axis({ autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: strips.links.map((_, i) => i), ticktext: strips.links.map(plain) }),
    });
  };

  // ---- switches --------------------------------------------------------------------------------
  const show = (name, on) => {
    if (on) view.off.delete(name);
    else view.off.add(name);
  };
  const syncSwitches = () => {
    for (const box of document.querySelectorAll("#comparison input[type=checkbox]")) {
      const on = isOn(data.strategies[box.dataset.index]);
      box.checked = on;
      box.closest("tr").classList.toggle("off", !on);
    }
    for (const button of document.querySelectorAll(".legend button[data-index]")) {
      button.setAttribute("aria-pressed", isOn(data.strategies[button.dataset.index]));
    }
    drawMeasures();
  };
  for (const box of document.querySelectorAll("#comparison input[type=checkbox]")) {
    box.addEventListener("change", () => {
      show(data.strategies[box.dataset.index].name, box.checked);
      syncSwitches();
    });
  }
  for (const button of document.querySelectorAll(".legend button[data-index]")) {
    const { name } = data.strategies[button.dataset.index];
    button.addEventListener("click", () => {
      show(name, view.off.has(name));
      syncSwitches();
    });
    button.addEventListener("dblclick", () => {
      data.strategies.forEach((s) => show(s.name, s.name === name));
      syncSwitches();
    });
  }
  byId("all")?.addEventListener("click", () => {
    view.off.clear();
    syncSwitches();
  });
  for (const choice of document.querySelectorAll("input[name=abscissa]")) {
    choice.addEventListener("change", () => {
      view.x = choice.value;
      drawMeasures();
    });
  }
  byId("log")?.addEventListener("change", (event) => {
    view.log = event.target.checked;
    drawMeasures();
  });
  byId("measure-choice")?.addEventListener("change", (event) => {
    view.measure = event.target.value;
    drawMeasures();
  });
  for (const button of document.querySelectorAll("#comparison thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const down = head.getAttribute("aria-sort") === "ascending";
      head.parentElement.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = byId("comparison").tBodies[0];
      const value = (row) => {
        const text = row.cells[head.cellIndex].dataset.value ?? "";
        return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
      };
      const sorted = [...body.rows].sort((a, b) => {
        const [u, v] = [value(a), value(b)];
        if (u === "" || v === "") return (u === "") - (v === ""); // missing values stay last
        return (down ? -1 : 1) * (u < v ? -1 : u > v ? 1 : 0);
      });
      body.append(...sorted);
    });
  }
  const drawAll = () => {
    drawMeasures();
    drawTimeline();
    drawStrips();
    drawWorld();
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    drawAll();
  });
  prefersDark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  offerRounds();
  drawAll();
})();
