(() => {
  "use strict";

  const given = JSON.parse(document.getElementById("report-data").textContent);
  const data = { metrics: [], views: [], sites: [] };
  const chosen = { metric: "", view: "" };
  const maps = patchsweepMaps(data, chosen);
  const by = (id) => document.getElementById(id);
  const TEXTS = ["clean", "corrupted", "answer", "wrong_answer"];
  const SETTINGS = ["metric", "direction", "intervention", "tolerance"];
  const AFTER_TYPING = 250; // milliseconds
  let run = null; // number of the run that is shown
  let source = null; // its events
  let place = null; // the cell that was clicked
  let typed = 0; // the last check; answers to earlier ones are late
  let timer = null;

  const question = () => ({
    ...Object.fromEntries(TEXTS.map((name) => [name, by(name).value])),
    sites: [...document.querySelectorAll("#sites input:checked")].map((box) => box.value),
    metric: by("metric").value,
    direction: by("direction").value,
    intervention: by("intervention").value,
    tolerance: given.tolerances[Number(by("tolerance").value)],
    chat: Boolean(by("chat") && by("chat").checked),
  });

  async function send(path, body) {
    try {
      const reply = await fetch(path, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      return await reply.json();
    } catch {
      return { error: "the explorer does not answer; is its terminal still open?" };
    }
  }

  const count = (n) => n.toLocaleString("en").replace(/,/g, "\u202f");

  function refuse(message) {
    const note = document.createElement("p");
    note.className = "notice warn";
    note.textContent = message;
    by("said").replaceChildren(note);
    by("run").disabled = true;
  }

  /** Asks for the tokens of what is typed, or for what is wrong with it; nothing runs. */
  async function check() {
    const mine = ++typed;
    const reply = await send("check", question());
    if (mine !== typed) return;
    if (reply.error) { refuse(reply.error); return; }
    by("said").innerHTML = reply.tokens; // escaped by the server
    const cost = document.createElement("p");
    cost.className = "note";
    cost.textContent = `${reply.n_tokens} tokens; ${count(reply.n_patches)} patches, `
      + `${count(reply.n_live)} of them live`;
    by("said").append(cost);
    by("run").disabled = false;
  }

  async function ask() {
    clearTimeout(timer);
    typed += 1; // a check on its way says no more than this
    const asked = question();
    const reply = await send("runs", asked);
    if (reply.error) { refuse(reply.error); return; }
    if (source) source.close();
    run = reply.run;
    chosen.metric = asked.metric;
    data.metrics = [asked.metric];
    by("command").textContent = reply.command;
    by("python").textContent = reply.python;
    by("report").href = `runs/${run}/report`;
    by("cell").hidden = true;
    by("again").hidden = by("maps").hidden = false;
    document.body.dataset.finished = "0";
    delete document.body.dataset.done;
    source = new EventSource(`runs/${run}/events`);
    source.onmessage = (message) => hear(JSON.parse(message.data));
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) tell("the explorer does not answer");
    };
  }

  function tell(text) { by("state").textContent = text; }

  function hear(event) {
    if (event.kind === "start") start(event);
    if (event.kind === "bar") move(event);
    if (event.kind === "map") show(event);
    if (event.kind === "failed") fail(event);
    if (event.kind === "done" || event.kind === "cancelled") {
      source.close();
      by("bar").hidden = true;
      tell("");
      document.body.dataset.done = String(run);
    }
  }

  function start(event) {
    data.sites = [];
    by("bar").hidden = false;
    by("bar").value = 0;
    tell("the model runs");
    by("grid").replaceChildren(...event.sites.map((site, index) => {
      const waiting = document.createElement("figure");
      waiting.className = "map waiting";
      waiting.dataset.at = String(index);
      const title = document.createElement("h3");
      title.textContent = `${given.words[site]} `;
      const code = document.createElement("code");
      code.textContent = site;
      title.append(code);
      const blank = document.createElement("div");
      blank.className = "blank";
      waiting.append(title, blank);
      return waiting;
    }));
  }

  function move(event) {
    by("bar").value = event.all ? event.done / event.all : 1;
    tell(`${count(event.done)} of ${count(event.all)} token-layers`);
  }

  function show(event) {
    const { index } = event;
    data.views = [event.view];
    chosen.view = event.view.key;
    data.sites[index] = event.figure;
    maps.forget(index);
    by("prompts").innerHTML = event.prompts;
    const old = by("grid").children[index];
    const made = document.createElement("template");
    made.innerHTML = event.html; // escaped by the server
    const figure = made.content.firstElementChild;
    if (old.dataset.at) {
      old.replaceWith(figure);
    } else { // the same map with more of its cells: the drawing stays
      old.querySelector("figcaption").replaceWith(figure.querySelector("figcaption"));
    }
    by("grid").children[index].classList.toggle("partial", !event.done);
    maps.fillPicks();
    const pick = document.querySelector(`select[data-pick="${index}"]`);
    if (pick) pick.onchange = () => draw(index);
    draw(index);
    if (event.done) {
      document.body.dataset.finished = String(Number(document.body.dataset.finished) + 1);
    }
  }

  function draw(index) {
    maps.draw(index);
    const target = by(`map-${index}`);
    if (!target.on || target.dataset.heard) return;
    target.dataset.heard = "yes";
    target.on("plotly_click", ({ points: [point] }) => {
      const site = data.sites[index];
      const [row, column] = Array.isArray(point.pointIndex)
        ? point.pointIndex : site.rows ? [point.pointIndex, 0] : [0, point.pointIndex];
      choose(index, row, column);
    });
  }

  function fail(event) {
    const figure = by("grid").children[event.index];
    const note = document.createElement("p");
    note.className = "notice warn";
    note.textContent = event.message;
    figure.querySelector(".blank, .plot").replaceWith(note);
  }

  function choose(index, row, column) {
    const where = maps.placeOf(index, row, column);
    const { site } = data.sites[index];
    const unit = where.head ?? where.kv_head;
    place = { site, layer: where.layer };
    if (where.pos !== undefined) place.pos = where.pos;
    if (unit !== undefined) place.unit = unit;
    const target = by(`map-${index}`);
    if (Array.isArray(target.data[0].z)) {
      Plotly.relayout(target, { shapes: [{
        type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5,
        line: { color: "#1c2126", width: 2 },
      }] });
    }
    const words = [`layer ${place.layer}`];
    if (unit !== undefined) words.push(`${where.head === undefined ? "key head" : "head"} ${unit}`);
    if (place.pos !== undefined) {
      const token = data.views[0].base[data.sites[index].labels.pos.indexOf(place.pos)];
      words.push(`position ${place.pos} (${token})`);
    }
    const code = document.createElement("code");
    code.textContent = site;
    by("named").replaceChildren(code, ` ${words.join(", ")}`);
    by("cell").hidden = false;
    look(document.querySelector(".tabs [aria-selected=true]") || document.querySelector(".tabs button"));
    by("cell").scrollIntoView({ behavior: "smooth", block: "start" });
  }

  /** Shows one page of the chosen cell. */
  function look(tab) {
    for (const other of document.querySelectorAll(".tabs button")) {
      other.setAttribute("aria-selected", String(other === tab));
    }
    const address = `runs/${run}/cell/${tab.dataset.kind}?${new URLSearchParams(place)}`;
    by("apart").href = address;
    by("waits").textContent = "the model runs";
    delete by("shown").dataset.loaded;
    by("shown").src = address;
  }

  by("shown").addEventListener("load", () => {
    if (!by("shown").getAttribute("src")) return;
    by("waits").textContent = "";
    by("shown").dataset.loaded = by("shown").getAttribute("src");
  });
  for (const tab of document.querySelectorAll(".tabs button")) {
    tab.addEventListener("click", () => look(tab));
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(by(button.dataset.copy).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(check, AFTER_TYPING);
  };
  for (const name of TEXTS) by(name).addEventListener("input", later);
  const tolerated = () => {
    by("tolerated").textContent = given.tolerances[Number(by("tolerance").value)] || "exact";
  };
  by("tolerance").addEventListener("input", tolerated);
  const boxes = [...document.querySelectorAll("#sites input"), ...(by("chat") ? [by("chat")] : [])];
  for (const control of [...SETTINGS.map(by), ...boxes]) {
    // once there are maps, a setting changes them at once
    control.addEventListener("change", async () => {
      await check();
      if (run !== null && !by("run").disabled) await ask();
    });
  }
  by("run").addEventListener("click", ask);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !by("run").disabled) ask();
  });
  tolerated(); // a browser may bring back what was chosen before a reload
  check();
})();
