(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const chosen = { metric: data.metrics[0], view: data.views[0].key };

  const maps = patchsweepMaps(data, chosen);
  const { AXIS, CONFIG, MONO, baseLayout, draw, fillPicks, plain, range, signed } = maps;

  function compare(panel) {
    const figure = [...document.querySelectorAll("[data-compare]")]
      .find((f) => f.dataset.compare === panel.key);
    figure.hidden = panel.metric !== chosen.metric;
    if (figure.hidden) return null;
    const target = figure.querySelector(".plot");
    const both = [...panel.exact, ...panel.estimate, 0];
    const low = Math.min(...both), high = Math.max(...both), pad = 0.06 * (high - low || 1);
    const span = [low - pad, high + pad];
    const missed = new Set(panel.misses);
    const tell = (i) => `${plain(panel.labels[i])}<br>exact ${signed(panel.exact[i])}`
      + `<br>${plain(panel.method)} ${signed(panel.estimate[i])}`;
    const points = (keep, more) => {
      const at = range(panel.exact.length).filter(keep);
      return {
        type: "scatter", x: at.map((i) => panel.exact[i]), y: at.map((i) => panel.estimate[i]),
        hovertext: at.map(tell), hoverinfo: "text", ...more(at),
      };
    };
    // names that would lie on one another are left to the pointer
    const roomy = new Set();
    for (const i of panel.misses) {
      const apart = [...roomy].every(
        (j) => Math.abs(panel.estimate[i] - panel.estimate[j]) > 0.04 * (span[1] - span[0]));
      if (apart) roomy.add(i);
    }
    const middle = (low + high) / 2;
    return Plotly.react(target, [
      points((i) => !missed.has(i), () => ({
        mode: "markers", marker: { size: 6, color: "#2166ac", opacity: 0.45 },
      })),
      points((i) => missed.has(i), (at) => ({
        mode: "markers+text",
        text: at.map((i) => (roomy.has(i) ? `\u00a0\u00a0${plain(panel.labels[i])}\u00a0\u00a0` : "")),
        // towards the middle of the plot, where there is room
        textposition: at.map((i) => (panel.exact[i] > middle ? "middle left" : "middle right")),
        textfont: { family: MONO, size: 11, color: "#8a3b00" },
        marker: { size: 8, color: "#b35c00", symbol: "diamond" },
      })),
    ], baseLayout(420, {
      margin: { l: 60, r: 12, t: 12, b: 48 },
      shapes: [{
        type: "line", x0: span[0], y0: span[0], x1: span[1], y1: span[1], layer: "below",
        line: { color: "#545d66", width: 1, dash: "dot" },
      }],
      xaxis: {
        ...AXIS, showgrid: true, gridcolor: "#e6eaee", zeroline: true, zerolinecolor: "#b9bec4",
        range: span, title: { text: `exact effect, ${plain(panel.site)}`, standoff: 8 },
      },
      yaxis: {
        ...AXIS, showgrid: true, gridcolor: "#e6eaee", zeroline: true, zerolinecolor: "#b9bec4",
        range: span, title: { text: `${plain(panel.method)} estimate`, standoff: 6 },
      },
    }), { ...CONFIG, toImageButtonOptions: { filename: panel.key, scale: 2 } });
  }

  /** Puts the prepared text of the chosen metric and view into its places. */
  function fillSlots() {
    const key = `${chosen.metric}|${chosen.view}`;
    const template = [...document.querySelectorAll("template")].find((t) => t.dataset.key === key);
    for (const part of template.content.cloneNode(true).children) {
      const slot = document.querySelector(`main [data-slot="${part.dataset.slot}"]`);
      slot.replaceChildren(...part.childNodes);
    }
  }

  function show() {
    fillSlots();
    fillPicks();
    data.sites.forEach((_, index) => draw(index));
    data.panels.forEach(compare);
    document.body.dataset.shown = `${chosen.metric}|${chosen.view}`;
  }

  for (const name of ["metric", "view"]) {
    const select = document.getElementById(name);
    if (!select) continue;
    select.value = chosen[name]; // a browser may bring back what was chosen before a reload
    select.addEventListener("change", () => {
      chosen[name] = select.value;
      show();
    });
  }
  for (const select of document.querySelectorAll("select[data-pick]")) {
    select.addEventListener("change", () => draw(Number(select.dataset.pick)));
  }
  // on paper the page is about 1100 wide (style.css zooms it), whatever the window was
  const plots = () => [...document.querySelectorAll(".js-plotly-plot")].filter((p) => p.clientWidth);
  window.addEventListener("beforeprint", () => plots().forEach((plot) => {
    Plotly.relayout(plot, { width: plot.closest(".wide") ? 1060 : 520 });
  }));
  window.addEventListener("afterprint", () => plots().forEach((plot) => {
    Plotly.relayout(plot, { width: null, autosize: true });
  }));
  show();
})();
