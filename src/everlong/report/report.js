/* Draws the plots in the colours of the theme, keeps one legend for all of them, sorts the table. */
(function () {
  "use strict";
  const root = document.documentElement;
  const { looks, titles, plots } = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  function ink(dark) {
    return dark
      ? { page: "#101318", text: "#c3cad3", grid: "#262c35", axis: "#4a5360", hover: "#181c23" }
      : { page: "#ffffff", text: "#444c57", grid: "#eaedf0", axis: "#b3bac3", hover: "#ffffff" };
  }

  function faded(hex, alpha) {
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }

  function band(series, colour) {
    return {
      type: "scatter", mode: "lines", fill: "toself", fillcolor: faded(colour, 0.13), line: { width: 0 },
      x: [...series.x, ...[...series.x].reverse()], y: [...series.band, ...[...series.y].reverse()],
      hoverinfo: "skip", meta: series.model,
    };
  }

  function line(series, colour, look, colours) {
    return {
      type: "scatter", mode: series.mode, x: series.x, y: series.y, name: titles[series.model], meta: series.model,
      customdata: series.hover, hovertemplate: `${titles[series.model]}: %{customdata}<extra></extra>`,
      hoverinfo: series.quiet ? "skip" : undefined, cliponaxis: false,
      line: { color: colour, width: 2, dash: look.dash },
      marker: { color: colour, symbol: look.marker, size: look.marker.startsWith("triangle") ? 10 : 8, line: { color: colours.page, width: 1 } },
    };
  }

  function bar(series, colour, colours, plot) {
    return {
      type: "bar", orientation: "h", x: series.x, y: series.y, name: titles[series.model], meta: series.model,
      marker: { color: colour }, text: series.hover, textposition: plot.grouped ? "outside" : "auto", insidetextanchor: "end",
      width: plot.grouped ? undefined : 0.62, offsetgroup: series.group,
      insidetextfont: { color: colours.page }, outsidetextfont: { color: colours.text }, textangle: 0, cliponaxis: false,
      customdata: series.hover, hovertemplate: `${titles[series.model]}: %{customdata} ${plot.unit || "tokens/s"}<extra></extra>`,
    };
  }

  function traces(plot, dark) {
    const colours = ink(dark);
    const made = [];
    for (const series of plot.series) {
      const look = looks[series.model];
      const colour = dark ? look.dark : look.light;
      if (series.mode === "bar") made.push(bar(series, colour, colours, plot));
      else {
        if (series.band) made.push(band(series, colour));
        const trace = line(series, colour, look, colours);
        if (series.quiet) delete trace.hovertemplate;
        made.push(trace);
      }
    }
    for (const trace of made) {
      trace.visible = !hidden.has(trace.meta);
      trace.showlegend = false;
    }
    return made;
  }

  function axis(spec, colours) {
    const made = {
      title: { text: spec.title, standoff: 10, font: { size: 12.5 } }, automargin: true, fixedrange: coarse,
      gridcolor: colours.grid, linecolor: colours.axis, zeroline: false, ticks: "", ticklabelstandoff: 4,
    };
    if (spec.log) made.type = "log";
    if (spec.tickvals) Object.assign(made, { tickmode: "array", tickvals: spec.tickvals, ticktext: spec.ticktext });
    if (spec.range) made.range = spec.range;
    if (spec.percent) made.tickformat = ".0%";
    if (spec.zero) made.rangemode = "tozero";
    if (spec.reversed) made.autorange = "reversed";
    return made;
  }

  function layout(plot, dark) {
    const colours = ink(dark);
    const bars = plot.series.some((series) => series.mode === "bar");
    const made = {
      paper_bgcolor: colours.page, plot_bgcolor: colours.page, margin: { l: 8, r: 24, t: 10, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colours.text },
      hovermode: bars ? "closest" : "x unified", hoverdistance: 60, dragmode: coarse ? false : "zoom", showlegend: false,
      hoverlabel: { bgcolor: colours.hover, bordercolor: colours.axis, font: { color: dark ? "#e8ebef" : "#171b21", size: 12.5 } },
      xaxis: axis(plot.x, colours), yaxis: axis(plot.y, colours),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.axis, activecolor: colours.text },
      shapes: [], annotations: [],
    };
    if (bars) Object.assign(made.yaxis, { showgrid: false });
    else Object.assign(made.xaxis, {
      showgrid: false, showline: true, hoverformat: ",.6~g", spikecolor: colours.axis, spikethickness: 1, spikedash: "solid",
      unifiedhovertitle: { text: plot.named ? "%{x}" : `%{x:,.6~g} ${plot.across || (plot.key === "recall" ? "pairs" : "tokens")}` },
    });
    for (const guide of plot.lines || []) {
      made.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: guide.y, y1: guide.y, line: { color: colours.text, width: 1.2, dash: "dot" } });
      made.annotations.push({ xref: "paper", x: 0, xanchor: "left", y: guide.y, yanchor: "bottom", text: guide.text, showarrow: false, font: { size: 11.5 } });
    }
    return made;
  }

  const config = {
    displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true, displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "pan2d", "zoom2d"],
  };

  function draw(dark) {
    for (const plot of plots) {
      if (plot.height) document.getElementById(`p-${plot.key}`).style.height = `${plot.height}px`;
      Plotly.react(`p-${plot.key}`, traces(plot, dark), layout(plot, dark), config);
    }
  }

  function sortBy(table, heads, column) {
    const descending = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column === 0 ? x.localeCompare(y) : Number(x) - Number(y);
      return descending ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  function themeButton() {
    const button = document.getElementById("theme");
    const say = () => { button.querySelector(".say").textContent = isDark() ? "Light" : "Dark"; };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("everlong-theme", root.dataset.theme); } catch (error) { /* storage may be forbidden */ }
      say();
      draw(isDark());
    });
    prefersDark.addEventListener("change", () => { say(); draw(isDark()); });
    say();
  }

  function legend() {
    for (const button of document.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => {
        const shown = hidden.delete(button.dataset.model) || !hidden.add(button.dataset.model);
        button.setAttribute("aria-pressed", String(shown));
        draw(isDark());
      });
    }
  }

  const table = document.getElementById("table");
  if (table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(table, heads, column)));
  }
  themeButton();
  legend();
  draw(isDark());
  addEventListener("beforeprint", () => draw(false));
  addEventListener("afterprint", () => draw(isDark()));
})();
