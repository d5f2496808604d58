// The maps of a page: `patchsweepMaps(data, chosen)` draws map i of `data.sites` into #map-i for the
// metric and the view that `chosen` names now.
const patchsweepMaps = (data, chosen) => {
  "use strict";

  // ColorBrewer RdBu, as in TransformerLens plots: blue towards the source run, red away from it
  const RED_BLUE = [
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
  ].map((colour, i) => [i / 10, colour]);
  const GREY = "#b9bec4"; // not run
  const SANS = getComputedStyle(document.body).fontFamily;
  const MONO = getComputedStyle(document.documentElement).getPropertyValue("--mono").trim();
  const TICK_CHARACTERS = 14;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  // plotly reads labels as a small HTML of its own: token text must not
  const plain = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => {
    const letters = [...String(text)];
    return letters.length <= TICK_CHARACTERS
      ? String(text) : letters.slice(0, TICK_CHARACTERS - 1).join("") + "…";
  };
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const signed = (x) => (x > 0 ? "+" : "") + number(x);

  /** The colour of a bar, by the scale of the maps; `x` from -1 to 1, null where not run. */
  function colourOf(x) {
    if (x === null) return GREY;
    const at = (Math.min(1, Math.max(-1, x)) + 1) * 5, low = Math.min(9, Math.floor(at));
    const [a, b] = [low, low + 1].map((i) => [1, 3, 5].map(
      (from) => parseInt(RED_BLUE[i][1].slice(from, from + 2), 16)));
    return `rgb(${a.map((part, i) => Math.round(part + (b[i] - part) * (at - low))).join(",")})`;
  }

  /** The numbers of one site for the chosen metric and view, unpacked once. */
  const unpacked = new Map();
  function frameOf(index) {
    const key = `${chosen.metric}|${chosen.view}`;
    const id = `${index}|${key}`;
    if (!unpacked.has(id)) {
      const packed = data.sites[index].frames[key];
      const frame = { ...packed, value: new Float32Array(bytes(packed.value)) };
      if (packed.effect) {
        frame.effect = new Float32Array(bytes(packed.effect));
        frame.recovered = new Float32Array(bytes(packed.recovered));
      } else {
        const gap = packed.base === null || packed.source === null
          ? NaN : packed.source - packed.base;
        frame.effect = frame.value.map((v) => v - packed.base);
        frame.recovered = frame.effect.map((e) => (gap === 0 ? NaN : e / gap));
      }
      if (packed.at) frame.at = new Uint16Array(bytes(packed.at));
      unpacked.set(id, frame);
    }
    return unpacked.get(id);
  }

  const viewOf = () => data.views.find((v) => v.key === chosen.view);

  function tokenLines(view, index) {
    const base = view.base[index], source = view.source[index];
    if (!base && !source) return view.key === "mean" ? ["tokens differ between pairs"] : [];
    if (base === source || !source) return [`token ${plain(base)}`];
    return [`token ${plain(base || "(differs between pairs)")}`, `in source ${plain(source)}`];
  }

  /** Axis labels: real tokens, one tick per position, so that repeated tokens stay apart. */
  function columnTicks(site, view, columns, fold, width) {
    const labels = site.columns ? site.labels[site.columns] : ["all"];
    const n = columns.length;
    const step = Math.max(1, Math.ceil((n * 13) / Math.max(width - 110, 100)));
    const at = range(n).filter((i) => i % step === 0);
    const behind = (i) => (view.n_pairs.length ? ` n=${view.n_pairs[i]}` : "");
    const text = at.map((column) => {
      if (fold && column === 0) return `<i>${fold} positions</i>`;
      const i = columns[column];
      const label = plain(short(labels[i])) + (site.columns === "pos" ? behind(i) : "");
      if (site.columns !== "pos") return label;
      const shown = plain(short(view.base[i] || ""));
      const name = view.differs[i] ? `<b>${shown || label}</b>` : shown;
      if (!shown) return name || label;
      return `${name} <span style="color:#6b747d">${label}</span>`;
    });
    const lengths = at.map((column) => columns[column]).map((i) => (
      [...short(view.base[i] || "")].length + [...short(labels[i])].length + behind(i).length));
    if (fold) lengths.push(`${fold} positions`.length);
    return { at, text, longest: Math.max(1, ...lengths) + 1 };
  }

  /** The columns of the store that a map draws; the first stands for all that are folded. */
  function columnsOf(site, view, frame) {
    const nAll = site.columns ? site.labels[site.columns].length : 1;
    if (site.columns !== "pos") return range(nAll);
    const drawn = range(Math.min(view.n_pos, nAll)).slice(view.first);
    return frame.fold ? drawn.slice(frame.fold - 1) : drawn;
  }

  /** The edges of drawn columns, the first of them narrow if it is folded. */
  const edges = (n, fold) => range(n + 1).map((i) => i - 0.5 + (fold && i === 0 ? 0.5 : 0));

  const AXIS = { showgrid: false, zeroline: false, fixedrange: true, ticks: "", linecolor: "#d9dee3" };
  const NAMES = { pos: "position", head: "head", kv_head: "key head", neuron: "neuron", layer: "layer" };
  const baseLayout = (height, more) => ({
    height,
    margin: { l: 46, r: 8, t: 12, b: 40 },
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    font: { family: SANS, size: 12, color: "#1c2126" },
    hoverlabel: {
      bgcolor: "#fff", bordercolor: "#545d66", align: "left",
      font: { family: SANS, size: 13, color: "#1c2126" },
    },
    showlegend: false,
    ...more,
  });

  function hover(site, view, frame, row, column, hidden, cell, fold) {
    const lines = [];
    if (fold) {
      const names = site.labels[site.columns];
      return `positions ${plain(names[column - fold + 1])} to ${plain(names[column])}<br>` +
        "before the first token that differs:<br>no patch changes anything here";
    }
    const put = (dim, index) => {
      if (!dim) return;
      lines.push(`${NAMES[dim]} ${plain(site.labels[dim][index])}`);
      if (dim === "pos") lines.push(...tokenLines(view, index));
      if (dim === "pos" && view.n_pairs.length) lines.push(`mean over ${view.n_pairs[index]} pairs`);
    };
    put(site.rows, row);
    put(site.columns, column);
    put(site.hidden, hidden);
    if (Number.isNaN(frame.value[cell])) return [...lines, "<b>not run</b>"].join("<br>");
    // a mean over some of the pairs is set against the ends of just those
    const base = frame.value[cell] - frame.effect[cell];
    const gap = frame.effect[cell] / frame.recovered[cell];
    const source = Number.isFinite(gap) ? base + gap : frame.source;
    lines.push(
      `<b>recovered ${number(frame.recovered[cell])}</b>`,
      `effect ${signed(frame.effect[cell])}`,
      `${plain(chosen.metric)} ${number(frame.value[cell])}`,
      `base ${number(base)} · source ${number(source)}`,
    );
    return lines.join("<br>");
  }

  /** Cells of a map as rows: what to colour, and what to say on pointing. */
  function cells(index) {
    const site = data.sites[index], frame = frameOf(index), view = viewOf();
    const nRows = site.rows ? site.labels[site.rows].length : 1;
    const nAll = site.columns ? site.labels[site.columns].length : 1;
    const columns = columnsOf(site, view, frame), nColumns = columns.length;
    const nHidden = site.full ? site.labels[site.hidden].length : 1;
    const pick = document.querySelector(`select[data-pick="${index}"]`);
    const fixed = pick && pick.value !== "all" ? Number(pick.value) : null;
    const shown = { z: [], text: [], nRows, nColumns, columns, site, frame, view };
    for (let row = 0; row < nRows; row++) {
      const z = [], text = [];
      for (const [at, column] of columns.entries()) {
        const flat = row * nAll + column;
        const hidden = fixed !== null ? fixed : frame.at ? frame.at[flat] : 0;
        const cell = flat * nHidden + (site.full ? hidden : 0);
        const x = frame[frame.quantity][cell];
        z.push(Number.isFinite(x) ? x : null);
        text.push(hover(site, view, frame, row, column, hidden, cell, at === 0 ? frame.fold : 0));
      }
      shown.z.push(z);
      shown.text.push(text);
    }
    return shown;
  }

  function draw(index) {
    const target = document.getElementById(`map-${index}`);
    const shown = cells(index);
    const { site, frame } = shown;
    target.hidden = frame.value.every(Number.isNaN); // the caption says that nothing has run
    if (target.hidden) return null;
    const oneLine = !site.rows || !site.columns;
    const [traces, layout] = oneLine ? bars(shown, target) : heat(shown, target);
    target.style.height = `${layout.height}px`; // a resize takes the height from here
    target.dataset.quantity = frame.quantity;
    target.dataset.limit = frame.limit;
    return Plotly.react(target, traces, layout, {
      ...CONFIG, toImageButtonOptions: { filename: site.site, scale: 2 },
    });
  }

  function heat(shown, target) {
    const { site, frame, view, z, text, nRows, nColumns, columns } = shown;
    const width = target.clientWidth || 560;
    const gap = nColumns > 60 || nRows > 60 ? 0 : 1;
    const common = {
      type: "heatmap", x: edges(nColumns, frame.fold), y: range(nRows), xgap: gap, ygap: gap,
      hovertext: text, hoverinfo: "text",
    };
    const traces = [{
      ...common, z, zmin: -frame.limit, zmax: frame.limit, colorscale: RED_BLUE,
      hoverongaps: false,
      colorbar: {
        exponentformat: "e",
        thickness: 11, outlinewidth: 0, len: 1, y: 0.5, ypad: 0, xpad: 8, nticks: 7,
        title: { text: frame.quantity, side: "right" },
      },
    }];
    const unrun = z.map((row) => row.map((x) => (x === null ? 1 : null)));
    if (unrun.some((row) => row.some((x) => x !== null))) {
      traces.push({
        ...common, z: unrun, zmin: 0, zmax: 1, colorscale: [[0, GREY], [1, GREY]],
        showscale: false, hoverongaps: false,
      });
    }
    const ticks = columnTicks(site, view, columns, frame.fold, width);
    const tokens = site.columns === "pos";
    const rowHeight = Math.max(5, Math.min(22, 400 / nRows));
    const step = Math.max(1, Math.ceil(nRows / 16));
    const rows = range(nRows).filter((i) => i % step === 0);
    const bottom = tokens ? 14 + 6.7 * ticks.longest : 44;
    return [traces, baseLayout(Math.round(nRows * rowHeight + bottom + 22), {
      margin: { l: 46, r: 8, t: 22, b: bottom },
      xaxis: {
        ...AXIS, tickmode: "array", ticktext: ticks.text,
        tickvals: ticks.at.map((i) => (frame.fold && i === 0 ? 0.25 : i)),
        tickangle: tokens ? -90 : 0, range: [frame.fold ? 0 : -0.5, nColumns - 0.5],
        tickfont: { family: tokens ? MONO : SANS, size: 11 },
        title: tokens ? undefined : { text: NAMES[site.columns], standoff: 6 },
      },
      yaxis: {
        ...AXIS, tickmode: "array", tickvals: rows, range: [-0.5, nRows - 0.5],
        ticktext: rows.map((i) => plain(short(site.labels[site.rows][i]))),
        tickfont: { size: 11 }, title: { text: NAMES[site.rows], standoff: 4 },
      },
    })];
  }

  /** A site with one axis: bars, coloured on the same scale as the maps. */
  function bars(shown, target) {
    const { site, frame, view, z, text, columns } = shown;
    const flat = z.flat(), labels = text.flat(), n = flat.length;
    const dim = site.rows || site.columns;
    const ticks = site.rows || !site.columns
      ? { at: range(n).filter((i) => i % Math.max(1, Math.ceil(n / 20)) === 0), text: null }
      : columnTicks(site, view, columns, frame.fold, target.clientWidth || 560);
    ticks.text ||= ticks.at.map((i) => (dim ? plain(short(site.labels[dim][i])) : "all"));
    const tokens = dim === "pos";
    const traces = [{
      type: "bar", x: range(n), y: flat, hovertext: labels, hoverinfo: "text",
      marker: {
        color: flat.map((x) => colourOf(x / frame.limit)),
        line: { color: "#545d66", width: 0.5 },
      },
    }];
    return [traces, baseLayout(tokens ? 340 : 280, {
      margin: { l: 56, r: 8, t: 22, b: tokens ? 14 + 6.7 * ticks.longest : 44 },
      bargap: 0.15,
      xaxis: {
        ...AXIS, tickmode: "array", tickvals: ticks.at, ticktext: ticks.text,
        tickangle: tokens ? -90 : 0, range: [-0.5, n - 0.5],
        tickfont: { family: tokens ? MONO : SANS, size: 11 },
        title: tokens || !dim ? undefined : { text: NAMES[dim], standoff: 6 },
      },
      yaxis: {
        ...AXIS, showgrid: true, gridcolor: "#e6eaee", zeroline: true, zerolinecolor: "#545d66",
        range: [-1.05 * frame.limit, 1.05 * frame.limit], title: { text: frame.quantity },
      },
    })];
  }

  /** The positions a reader can choose in a map of heads, named by the chosen pair's tokens. */
  function fillPicks() {
    const view = viewOf();
    for (const select of document.querySelectorAll("select[data-pick]")) {
      const site = data.sites[Number(select.dataset.pick)];
      const kept = select.value || "all";
      const options = [new Option("largest of all", "all")];
      site.labels.pos.slice(0, view.n_pos).forEach((label, i) => {
        if (i >= view.first) options.push(new Option(view.base[i] ? `${label} ${short(view.base[i])}` : `${label}`, String(i)));
      });
      select.replaceChildren(...options);
      select.value = options.some((o) => o.value === kept) ? kept : "all";
    }
  }

  /** Lets go of the numbers of a site whose frames are new. */
  function forget(index) {
    for (const id of unpacked.keys()) if (id.startsWith(`${index}|`)) unpacked.delete(id);
  }

  /** The place of the patch that a cell of a map shows: its labels by dim, in the order of dims. */
  function placeOf(index, row, column) {
    const site = data.sites[index], frame = frameOf(index), view = viewOf();
    const nAll = site.columns ? site.labels[site.columns].length : 1;
    const at = columnsOf(site, view, frame)[column];
    const pick = document.querySelector(`select[data-pick="${index}"]`);
    const flat = row * nAll + at;
    const hidden = pick && pick.value !== "all" ? Number(pick.value) : frame.at ? frame.at[flat] : 0;
    const place = {};
    for (const [dim, i] of [
      [site.rows, row], [site.columns, at], [site.hidden, hidden],
    ]) if (dim) place[dim] = site.labels[dim][i];
    return place;
  }

  return {
    AXIS, CONFIG, MONO, baseLayout, draw, fillPicks, forget, placeOf, plain, range, signed,
  };
};
