(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const grid = document.getElementById("grid"), told = document.getElementById("told");
  const select = (name) => document.getElementById(name);
  const chosen = (name) => select(name).value;

  const BLUES = ["#ffffff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c"];
  const RED_BLUE = [
    "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac",
  ];
  const GREY = "#eceff1"; // no such point

  /** A colour of the scale, `x` from 0 to 1, and whether ink on it must be white. */
  function colour(scale, x) {
    const at = Math.min(1, Math.max(0, x)) * (scale.length - 1), low = Math.min(scale.length - 2, Math.floor(at));
    const [a, b] = [low, low + 1].map((i) => [1, 3, 5].map((from) => parseInt(scale[i].slice(from, from + 2), 16)));
    const parts = a.map((part, i) => Math.round(part + (b[i] - part) * (at - low)));
    const light = (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]) / 255;
    return [`rgb(${parts.join(",")})`, light < 0.45];
  }

  const signed = (x) => (x > 0 ? "+" : "") + number(x);

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  /** What is chosen: the run whose words are shown, and the one that it is set against, if any. */
  function shown() {
    const pair = data.pairs[Number(chosen("pair"))];
    const change = chosen("run") === "change";
    return { pair, run: pair.runs[change ? 1 : Number(chosen("run"))], against: change ? pair.runs[0] : null };
  }

  function colourOf({ run, against }, row, pos) {
    const prob = run.answer_prob[row][pos], rank = run.answer_rank[row][pos];
    if (prob === null) return [GREY, false];
    if (against) { // two powers of ten: the full colour
      const up = Math.log10((1 + against.answer_rank[row][pos]) / (1 + rank));
      return colour(RED_BLUE, 0.5 + up / 4);
    }
    if (chosen("colour") === "top") return colour(BLUES, run.top_prob[row][pos][0]);
    if (chosen("colour") === "answer") return colour(BLUES, prob);
    return colour(BLUES, 1 - Math.log10(1 + rank) / 4); // rank 10000: white
  }

  function draw() {
    const now = shown(), { pair, run } = now;
    select("colour").disabled = now.against !== null;
    const table = element("table"), head = element("tr");
    head.append(element("th", "after layer"));
    pair.tokens.forEach((token, i) => {
      const cell = element("th", undefined, i === pair.at ? "at" : "");
      cell.scope = "col";
      cell.append(element("small", String(i)), element("bdi", token));
      head.append(cell);
    });
    const body = element("tbody");
    data.rows.forEach((row, index) => {
      if (!row.block && chosen("rows") === "blocks") return;
      const line = element("tr"), name = element("th", row.name);
      name.scope = "row";
      line.append(name);
      pair.tokens.forEach((_, pos) => {
        const word = data.words[run.top[index][pos][0]];
        const cell = element("td");
        cell.append(element("bdi", word));
        const [fill, dark] = colourOf(now, index, pos);
        cell.style.background = fill;
        cell.classList.toggle("dark", dark);
        cell.classList.toggle("right", word === pair.answer);
        cell.classList.toggle("wrong", word === pair.wrong);
        cell.dataset.at = `${index} ${pos}`;
        line.append(cell);
      });
      body.prepend(line); // the last layer on top
    });
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    grid.replaceChildren(table);
    for (const key of ["prob", "rank"]) {
      const curves = pair.curves[key];
      Plotly.restyle(document.getElementById(`curve-${key}`), {
        y: curves.map((c) => c.y), name: curves.map((c) => c.name), hovertext: curves.map((c) => c.hovertext),
      });
    }
    document.body.dataset.shown = ["pair", "run", "rows", "colour"].map(chosen).join("|");
  }

  function tell(cell) {
    for (const old of grid.querySelectorAll("td.on")) old.classList.remove("on");
    told.hidden = !cell;
    if (!cell) return;
    cell.classList.add("on");
    const [row, pos] = cell.dataset.at.split(" ").map(Number);
    const { pair, run, against } = shown();
    const place = element("div");
    place.append(`after ${data.rows[row].words}, position ${pos} `, element("bdi", pair.tokens[pos], "token"));
    const best = element("table");
    run.top[row][pos].forEach((word, i) => {
      const line = element("tr"), name = element("td");
      name.append(element("bdi", data.words[word], "token"));
      line.append(name, element("td", number(run.top_prob[row][pos][i])));
      best.append(line);
    });
    const ends = [["answer", pair.answer], ["wrong", pair.wrong]].map(([kind, word]) => {
      const line = element("div"), prob = run[`${kind}_prob`][row][pos];
      line.append(element("bdi", word, "token"), ` ${number(prob)}, rank ${run[`${kind}_rank`][row][pos] ?? "–"}`);
      if (against) line.append(` (unpatched ${number(against[`${kind}_prob`][row][pos])}, rank ${against[`${kind}_rank`][row][pos]})`);
      return line;
    });
    told.replaceChildren(place, best, ...ends);
    const box = cell.getBoundingClientRect(), own = told.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, window.innerWidth - own.width - 8));
    const below = box.bottom + own.height + 12 < window.innerHeight;
    told.style.left = `${left}px`;
    told.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - own.height - 6)}px`;
  }

  const cellOf = (event) => event.target.closest("#grid td");
  grid.addEventListener("pointerover", (event) => tell(cellOf(event)));
  grid.addEventListener("click", (event) => tell(cellOf(event)));
  grid.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tell(null); });
  window.addEventListener("scroll", () => tell(null), { passive: true });
  for (const name of ["pair", "run", "rows", "colour"]) {
    select(name).selectedIndex = 0; // a browser may bring back what was chosen before a reload
    select(name).addEventListener("change", () => { tell(null); draw(); });
  }
  draw();
})();
