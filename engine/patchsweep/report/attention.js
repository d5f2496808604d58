(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const family = getComputedStyle(document.body).fontFamily;
  const KINDS = ["base", "source", "attribution"];
  const LEFT = 84, TOP = 74; // room for labels
  const LABEL = 11; // their size
  const LARGE_CELL = 14;
  const INK = "#1c2126", SOFT = "#545d66", ACCENT = "#8a3b00", WASH = "#e8ecf0";

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const short = (text) => {
    const letters = [...text];
    return letters.length <= 11 ? text : letters.slice(0, 10).join("") + "…";
  };
  const signed = (x) => (x > 0 ? "+" : "") + number(x);

  const pairs = data.pairs.map((pair) => ({
    ...pair,
    pattern: new Uint16Array(bytes(pair.pattern)),
    attribution: new Int16Array(bytes(pair.attribution)),
    size: (pair.n * (pair.n + 1)) / 2,
  }));
  const n_ranks = pairs[0].limit[0].length;
  const chosen = { pair: 0, metric: 0, weighted: false };

  // the number of a cell; `kind` is one of KINDS
  const at = (pair, rank, kind, cell) => {
    if (kind === "attribution") {
      const i = (chosen.metric * n_ranks + rank) * pair.size + cell;
      return (pair.attribution[i] / 32767) * pair.limit[chosen.metric][rank];
    }
    const run = kind === "source" ? 1 : 0;
    return pair.pattern[(run * n_ranks + rank) * pair.size + cell] / 65535;
  };
  const cellOf = (dest, src) => (dest * (dest + 1)) / 2 + src;
  const shownAt = (pair, rank, kind, dest, src) => {
    const value = at(pair, rank, kind, cellOf(dest, src));
    if (kind === "attribution" || !chosen.weighted) return value;
    return value * pair.norm[kind === "source" ? 1 : 0][rank][src];
  };

  // colours between the stops of a scale, looked up by a number in 0..1
  const scale = (stops) => {
    const rgb = stops.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    return Array.from({ length: 256 }, (_, i) => {
      const place = (i / 255) * (rgb.length - 1);
      const low = Math.min(Math.floor(place), rgb.length - 2);
      const mix = rgb[low].map((c, k) => Math.round(c + (place - low) * (rgb[low + 1][k] - c)));
      return `rgb(${mix.join(",")})`;
    });
  };
  const colours = {
    pattern: scale(data.colours.pattern),
    attribution: scale(data.colours.attribution),
  };

  const limitOf = (pair, rank, kind) => {
    if (kind === "attribution") return pair.limit[chosen.metric][rank];
    if (!chosen.weighted) return 1;
    let most = 0;
    for (const run of ["base", "source"]) {
      for (let dest = 0; dest < pair.n; dest++) {
        for (let src = 0; src <= dest; src++) {
          most = Math.max(most, shownAt(pair, rank, run, dest, src));
        }
      }
    }
    return most;
  };
  const largest = (pair, rank) => {
    let best = [0, 0], most = -1;
    for (let dest = 0; dest < pair.n; dest++) {
      for (let src = 0; src <= dest; src++) {
        const size = Math.abs(at(pair, rank, "attribution", cellOf(dest, src)));
        if (size > most) [best, most] = [[dest, src], size];
      }
    }
    return best;
  };

  const heads = [...document.querySelectorAll(".head")].map((card) => ({
    card,
    rank: Number(card.dataset.rank),
    maps: KINDS.map((kind) => ({
      kind,
      canvas: card.querySelector(`[data-map="${kind}"]`),
      caption: card.querySelector(`[data-caption="${kind}"]`),
    })),
  }));

  const draw = (head, map, cursor) => {
    const pair = pairs[chosen.pair], n = pair.n, { kind, canvas } = map;
    const large = head.card.classList.contains("large");
    const room = canvas.parentElement.clientWidth - LEFT - 2;
    const cell = Math.max(Math.min(room / n, large ? 30 : 22), large ? LARGE_CELL : 1);
    const width = Math.ceil(LEFT + n * cell) + 2, height = Math.ceil(TOP + n * cell) + 2;
    const dots = window.devicePixelRatio || 1;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * dots);
    canvas.height = Math.round(height * dots);
    map.cell = cell;
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    pen.fillStyle = WASH;
    pen.fillRect(LEFT, TOP, n * cell, n * cell);

    const limit = map.limit || 1, signedMap = kind === "attribution";
    const colour = signedMap ? colours.attribution : colours.pattern;
    for (let dest = 0; dest < n; dest++) {
      for (let src = 0; src <= dest; src++) {
        const share = shownAt(pair, head.rank, kind, dest, src) / limit;
        const place = Math.round(255 * Math.min(1, Math.max(0, signedMap ? 0.5 + share / 2 : share)));
        pen.fillStyle = colour[place];
        pen.fillRect(LEFT + src * cell, TOP + dest * cell, cell + 0.4, cell + 0.4);
      }
    }
    const frame = ([dest, src], style, thick) => {
      pen.strokeStyle = style;
      pen.lineWidth = thick;
      pen.strokeRect(LEFT + src * cell - 0.5, TOP + dest * cell - 0.5, cell + 1, cell + 1);
    };
    frame(head.largest, INK, 1.2);
    if (cursor) frame(cursor, ACCENT, 2);

    // as many labels as fit; the row and column pointed at take the place of their neighbours
    const [own, other] = kind === "source" ? [1, 0] : [0, 1];
    const step = Math.ceil(LABEL / cell);
    const [row, column] = cursor || head.largest;
    const labels = (special) =>
      [...Array(n).keys()].filter(
        (i) => i === special || (i % step === 0 && Math.abs(i - special) * cell >= LABEL));
    const style = (i, special) => {
      pen.fillStyle = pair.tokens[own][i] !== pair.tokens[other][i] ? ACCENT : i === special ? INK : SOFT;
      pen.font = `${i === special ? "bold " : ""}${LABEL}px ${family}`;
    };
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const i of labels(row)) {
      style(i, row);
      pen.fillText(short(pair.tokens[own][i]), LEFT - 5, TOP + (i + 0.5) * cell, LEFT - 6);
    }
    pen.textAlign = "left";
    for (const i of labels(column)) {
      style(i, column);
      pen.save();
      pen.translate(LEFT + (i + 0.5) * cell, TOP - 5);
      pen.rotate(-Math.PI / 2);
      pen.fillText(short(pair.tokens[own][i]), 0, 0, TOP - 6);
      pen.restore();
    }
  };

  const prepare = (head) => {
    const pair = pairs[chosen.pair], { unit } = data.metrics[chosen.metric];
    head.largest = largest(pair, head.rank);
    for (const map of head.maps) {
      map.limit = limitOf(pair, head.rank, map.kind);
      const run = `<b>${map.kind}</b>`;
      const most = number(map.limit);
      map.caption.innerHTML = map.kind === "attribution"
        ? `<b>attribution</b>, darkest: ±${most}` : chosen.weighted
          ? `${run} pattern × |v|, darkest: ${most}` : `${run} pattern, 0 to 1`;
      if (map.kind === "attribution") map.caption.append(` ${unit}`);
    }
    const note = head.card.querySelector("h3 small");
    const [total, exact] = [pair.total, pair.exact].map((of) => of[chosen.metric][head.rank]);
    note.textContent =
      `attribution in this pair: ${signed(total)} ${unit}, exact: ${signed(exact)}`;
  };
  const drawHead = (head, cursor) => head.maps.forEach((map) => draw(head, map, cursor));
  const drawAll = () => heads.forEach((head) => drawHead(head));

  const tip = document.querySelector(".tip");
  const point = (head, map, event) => {
    const pair = pairs[chosen.pair], box = map.canvas.getBoundingClientRect();
    const dest = Math.floor((event.clientY - box.top - TOP) / map.cell);
    const src = Math.floor((event.clientX - box.left - LEFT) / map.cell);
    if (src < 0 || dest < src || dest >= pair.n) return leave(head);
    drawHead(head, [dest, src]);
    const [base, source] = [0, 1].map((run) => pair.tokens[run]);
    const both = (i) => (base[i] === source[i] ? base[i] : `${base[i]} (source: ${source[i]})`);
    const cell = cellOf(dest, src), { unit } = data.metrics[chosen.metric];
    const [p, q] = ["base", "source"].map((run) => at(pair, head.rank, run, cell));
    const worth = [0, 1].map((run) => number(pair.norm[run][head.rank][src]));
    tip.textContent =
      `query ${both(dest)} at ${dest}\nlooks at ${both(src)} at ${src}\n` +
      `probability: base ${number(p)}, source ${number(q)}\n` +
      `|v| there: base ${worth[0]}, source ${worth[1]}\n` +
      `attribution: ${signed(at(pair, head.rank, "attribution", cell))} ${unit}`;
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    const below = event.clientY + 16 + tip.offsetHeight > window.innerHeight;
    tip.style.top = `${below ? event.clientY - 12 - tip.offsetHeight : event.clientY + 16}px`;
  };
  const leave = (head) => {
    if (tip.hidden) return;
    tip.hidden = true;
    drawHead(head);
  };

  for (const head of heads) {
    for (const map of head.maps) {
      map.canvas.addEventListener("pointermove", (event) => point(head, map, event));
      map.canvas.addEventListener("pointerdown", (event) => point(head, map, event));
      map.canvas.addEventListener("pointerleave", () => leave(head));
    }
    const button = head.card.querySelector("button");
    button.addEventListener("click", () => {
      const large = head.card.classList.toggle("large");
      button.textContent = large ? "side by side" : "enlarge";
      button.setAttribute("aria-pressed", String(large));
      drawHead(head);
    });
  }

  const choose = () => {
    chosen.pair = Number(document.getElementById("pair").value);
    chosen.metric = Number(document.getElementById("metric").value);
    chosen.weighted = document.getElementById("weighted").value !== "";
    for (const block of document.querySelectorAll("[data-pair]")) {
      const { pair, metric } = block.dataset;
      block.hidden = Number(pair) !== chosen.pair
        || (metric !== undefined && Number(metric) !== chosen.metric);
    }
    heads.forEach(prepare);
    drawAll();
  };
  for (const name of ["pair", "metric", "weighted"]) {
    document.getElementById(name).addEventListener("change", choose);
  }
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
  choose();
})();
