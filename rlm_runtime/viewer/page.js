"use strict";
// The page: which run is open, what is selected, filters, search, keys, and new events of a live run.

(function () {
  const source = findSource();
  const open = new Set(["0"]);
  const state = { run: null, model: null, next: 0, complete: false, token: 0, single: false, errors: false, depth: null, hits: null, hit: -1, grew: 0 };

  const live = () => source.live && !state.complete && Date.now() - state.grew < 60_000;
  // A live run's clock runs on between events; a dead one's stops at its last event.
  const now = () => (state.model ? state.model.last + (live() ? Math.min((Date.now() - state.grew) / 1000, 60) : 0) : 0);
  const describe = (bar) => {
    const item = bar.item;
    const event = item.row === "turn" ? null : state.model.event(item.begin);
    const what = item.row === "turn" ? `Turn ${item.number}, ${bar.pale ? "running code" : "the model replies"}` : `${item.kind === "rlm" ? "Child RLM" : item.kind === "tool" ? "Tool" : "LM call"} ${oneLine(item.name, 40)}`;
    return [el("b", {}, what), el("span", {}, ` ${seconds(bar.stop - bar.start)}`), event ? el("div", { class: "quiet" }, oneLine(event.question ?? event.prompt, 120)) : "", item.failed ? el("div", { class: "bad-text" }, "failed") : ""];
  };

  const tree = new Tree(byId("tree"), { onSelect: chosen, now });
  const timeline = new Timeline(byId("canvas"), byId("tip"), { onSelect: go, describe, now });
  const detail = new Detail(byId("detail"), { model: () => state.model, go, now });
  const runs = new Runs(byId("runs"), (id) => openRun(id));

  // What is selected

  function go(item, keepHits = false) {
    if (!keepHits) closeHits();
    if (!tree.go(item)) {
      clearFilters();
      tree.go(item);
    }
  }

  function chosen(item) {
    detail.show(item);
    timeline.choose(item);
    mark();
    const where = item.id === "0" ? "" : `&at=${encodeURIComponent(item.id)}`;
    history.replaceState(null, "", `#run=${encodeURIComponent(state.run)}${where}`);
    fetchWhole(item);
  }

  /** Events came with long texts cut; those of the chosen item are fetched whole. */
  async function fetchWhole(item) {
    const { model, run } = state;
    const numbers = detail.cutOf(item);
    if (!numbers.length) return;
    try {
      const whole = await Promise.all(numbers.map((n) => source.event(run, n)));
      if (state.model !== model) return;
      numbers.forEach((n, i) => model.replace(n, whole[i]));
      if (tree.item === item) {
        const at = byId("detail").scrollTop;
        detail.show(item);
        byId("detail").scrollTop = at;
        mark();
      }
    } catch (error) {
      problem(error);
    }
  }

  function itemOf(id) {
    const [node, turn] = id.split("#");
    const found = state.model.nodes.get(node);
    return turn === undefined ? found : found?.turns.find((t) => t.number === Number(turn));
  }

  // Filters

  function wanted() {
    if (!state.errors && state.depth === null) return null;
    return (item) => !item.top && (!state.errors || item.failed) && (state.depth === null || depthOf(item) === state.depth);
  }

  function filter() {
    byId("errors").setAttribute("aria-pressed", String(state.errors));
    byId("depth").value = state.depth === null ? "" : String(state.depth);
    tree.show(state.model, open, wanted());
    if (tree.at >= 0) tree.reveal();
  }

  function clearFilters() {
    state.errors = false;
    state.depth = null;
    filter();
  }

  byId("errors").addEventListener("click", () => {
    state.errors = !state.errors;
    if (state.model) filter();
  });
  byId("depth").addEventListener("change", (event) => {
    state.depth = event.target.value === "" ? null : Number(event.target.value);
    filter();
    byId("tree").focus();
  });

  // Search

  const PLACES = { "message.content": "reply", raw: "whole reply", code: "code", "result.stdout": "output", "result.stderr": "stderr", prompt: "prompt", value: "result", "messages.content": "prompt added", text: "told", summary: "summary", question: "question", answer: "answer", preview: "context" };

  async function search(words) {
    if (!words.trim() || !state.model) return closeHits();
    const { run, model } = state;
    try {
      const found = await source.search(run, words);
      if (state.model !== model || byId("words").value !== words) return;
      state.words = words;
      state.hits = found.hits.filter((h) => model.of[h.event]);
      state.hit = -1;
      showHits(found.more);
      mark();
    } catch (error) {
      problem(error);
    }
  }

  function showHits(more) {
    const box = byId("hits");
    box.hidden = false;
    byId("tree").hidden = true;
    const title = state.hits.length ? `${plural(state.hits.length, "hit")}${more ? ", and more" : ""}` : "Nothing found";
    box.replaceChildren(
      el("div", { class: "hits-head" }, el("b", { role: "status" }, title), el("span", { class: "grow" }), el("button", { class: "link", onclick: () => { closeHits(); byId("tree").focus(); } }, "close (Esc)")),
      el("div", { role: "list" }, state.hits.map((hit, i) => {
        const item = state.model.of[hit.event];
        const where = item.top ? "Run" : item.row === "turn" ? (item.node.top ? `Turn ${item.number}` : `${oneLine(item.node.name, 20)}, turn ${item.number}`) : `Call ${oneLine(item.name, 20)}`;
        return el("button", { class: "hit", role: "listitem", "data-hit": i, onclick: () => openHit(i) },
          el("span", { class: "k" }, el("i", { class: "dot " + depthClass(depthOf(item)) }), where, " · ", PLACES[hit.field] ?? oneLine(hit.field, 40)),
          el("span", { class: "snip" }, oneLine(hit.before, 40), hit.before.endsWith(" ") ? " " : "", el("mark", {}, oneLine(hit.match, 80)), hit.after.startsWith(" ") ? " " : "", oneLine(hit.after, 80)));
      })));
  }

  function openHit(i) {
    if (!state.hits?.length) return;
    state.hit = ((i % state.hits.length) + state.hits.length) % state.hits.length;
    const hit = state.hits[state.hit];
    byId("hits").querySelectorAll(".hit").forEach((h, j) => h.toggleAttribute("aria-current", j === state.hit));
    const button = byId("hits").querySelector(`[data-hit="${state.hit}"]`);
    button?.scrollIntoView({ block: "nearest" });
    for (const part of ["Added to the prompt", "Whole reply", "Thinking"]) {
      if (hit.field.startsWith("messages") === (part[0] === "A")) detail.opened.set(part, true);
    }
    go(state.model.of[hit.event], true);
    revealMark();
  }

  function closeHits() {
    state.hits = null;
    state.words = "";
    byId("hits").hidden = true;
    byId("tree").hidden = false;
    mark();
    tree.draw();
  }

  /** Colour the words searched for where they stand in the detail; the page's nodes stay as they are. */
  function mark() {
    if (!window.CSS?.highlights) return;
    CSS.highlights.delete("found");
    state.marks = [];
    if (!state.words) return;
    const wanted = state.words.toLowerCase();
    const walker = document.createTreeWalker(byId("detail"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode() && state.marks.length < 500) {
      const text = walker.currentNode.data.toLowerCase();
      if (text.length !== walker.currentNode.data.length) continue;
      for (let at = text.indexOf(wanted); at >= 0 && state.marks.length < 500; at = text.indexOf(wanted, at + wanted.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + wanted.length);
        state.marks.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...state.marks));
  }

  function revealMark() {
    const box = byId("detail");
    const first = state.marks?.find((range) => range.getClientRects().length);
    if (first) box.scrollTop += first.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }

  let pause = 0;
  byId("words").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => search(event.target.value), 200);
  });
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(pause);
    if (state.hits && state.words === byId("words").value) openHit(state.hit + 1);
    else search(byId("words").value).then(() => openHit(0));
  });

  // Loading and following

  function problem(error) {
    const box = byId("problem");
    box.hidden = !error;
    box.textContent = error ? visible(error.message || error) : "";
  }

  async function openRun(id, at = null) {
    const token = ++state.token;
    state.run = id;
    state.next = 0;
    state.complete = false;
    state.errors = false;
    state.depth = null;
    open.clear();
    open.add("0");
    byId("words").value = "";
    problem(null);
    try {
      const batch = await source.events(id, 0);
      if (token !== state.token) return;
      state.model = new Model();
      state.grew = 0; // whether it is live shows when it grows
      take(batch);
    } catch (error) {
      return problem(error);
    }
    if (source.live && !state.complete) state.grew = Date.now();
    view("run");
    timeline.fit();
    byId("errors").setAttribute("aria-pressed", "false");
    byId("crumb").textContent = visible(id);
    closeHits();
    render();
    go((at && itemOf(at)) || state.model.root);
    byId("tree").focus({ preventScroll: true });
    ready();
    if (!state.complete && source.live) follow(token);
  }

  function take(batch) {
    state.model.add(batch.events);
    state.next = batch.next;
    state.complete = batch.complete;
    if (batch.events.length && state.grew) state.grew = Date.now();
  }

  async function follow(token) {
    let wait = 500;
    while (token === state.token && !state.complete) {
      await new Promise((done) => setTimeout(done, document.hidden ? 3000 : wait));
      if (token !== state.token) return;
      try {
        const batch = await source.events(state.run, state.next);
        if (token !== state.token) return;
        problem(null);
        if (batch.next < state.next) return openRun(state.run); // another run took the file's place
        wait = batch.events.length ? 500 : Math.min(wait * 1.2, 2000);
        grow(batch);
      } catch (error) {
        problem(new Error(`The viewer's server does not answer (${error.message}); trying again.`));
        wait = Math.min(wait * 2, 10_000);
      }
    }
  }

  function grow(batch) {
    const item = tree.item;
    const turns = state.model.root.turns;
    const following = item?.row === "turn" && item === turns[turns.length - 1];
    const touched = batch.events.length > 0;
    take(batch);
    render();
    if (!touched || !item) return;
    const latest = turns[turns.length - 1];
    if (following && latest !== item && !state.hits) return go(latest);
    const ours = batch.events.some((_, i) => state.model.of[state.next - batch.events.length + i] === item);
    if (ours) {
      const at = byId("detail").scrollTop;
      detail.show(item);
      byId("detail").scrollTop = at;
      fetchWhole(item);
    }
  }

  function render() {
    const { model } = state;
    byId("head").replaceChildren(...headOf(model, { live: live(), time: now() }));
    byId("live").hidden = !live();
    byId("error-count").textContent = model.failures ? String(model.failures) : "";
    const depths = model.deepest;
    const choice = byId("depth");
    if (choice.options.length !== Math.min(depths, 20) + 2) {
      choice.replaceChildren(el("option", { value: "" }, "all"), ...Array.from({ length: Math.min(depths, 20) + 1 }, (_, d) => el("option", { value: d }, String(d))));
      choice.value = state.depth === null ? "" : String(state.depth);
    }
    tree.show(model, open, wanted());
    timeline.show(model);
  }

  function view(name) {
    byId("runs").hidden = name !== "runs";
    byId("run").hidden = name !== "run";
    document.body.dataset.view = name;
    byId("home").disabled = state.single;
  }

  async function home() {
    if (state.single) return;
    const token = ++state.token;
    state.run = null;
    byId("crumb").textContent = "";
    byId("live").hidden = true;
    history.replaceState(null, "", location.pathname);
    view("runs");
    for (let first = true; token === state.token; first = false) {
      try {
        const list = await source.runs();
        if (token !== state.token) return;
        problem(null);
        runs.show(list.runs);
        if (first) runs.move(1);
        ready();
      } catch (error) {
        problem(error);
      }
      await new Promise((done) => setTimeout(done, 3000));
    }
  }

  function ready() {
    document.documentElement.dataset.ready ??= performance.now().toFixed(1);
  }

  // Keys

  const isError = (item) => item.failed;
  const KEYS = [
    ["j ↓ / k ↑", "next, previous"],
    ["→ l / ← h", "open or go in, close or go out"],
    ["Enter", "open or close; in the list of runs, open the run"],
    ["] / [", "next, previous turn of the root"],
    ["x / X", "next, previous failure"],
    ["g / G", "first, last"],
    ["Space / Shift Space", "scroll the details"],
    ["/", "search; Enter goes to the next hit"],
    ["n / N", "next, previous hit"],
    ["e", "errors only"],
    ["d", "show one depth, the next, all"],
    ["+ / − / 0", "zoom the timeline (also Ctrl wheel, drag)"],
    ["b", "all runs"],
    ["Esc", "close search or filters"],
  ];
  byId("keys").replaceChildren(...KEYS.flatMap(([k, what]) => [el("dt", {}, k.split(" / ").flatMap((x, i) => [i ? " / " : "", ...x.split(" ").map((y) => el("kbd", {}, y))])), el("dd", {}, what)]));

  const turnStep = (step) => tree.next((item) => item.row === "turn" && item.node.top, step);
  const ACTIONS = {
    j: () => tree.move(1), ArrowDown: () => tree.move(1), k: () => tree.move(-1), ArrowUp: () => tree.move(-1),
    l: () => tree.right(), ArrowRight: () => tree.right(), h: () => tree.left(), ArrowLeft: () => tree.left(),
    Enter: () => tree.toggle(tree.at), g: () => tree.select(0), Home: () => tree.select(0), G: () => tree.select(Infinity), End: () => tree.select(Infinity),
    PageDown: () => tree.move(12), PageUp: () => tree.move(-12),
    "]": () => turnStep(1), "[": () => turnStep(-1), x: () => tree.next(isError), X: () => tree.next(isError, -1),
    n: () => openHit(state.hit + 1), N: () => openHit(state.hit - 1), e: () => byId("errors").click(),
    d: () => {
      state.depth = state.depth === null ? 0 : state.depth >= state.model.deepest ? null : state.depth + 1;
      filter();
    },
    " ": (event) => byId("detail").scrollBy(0, (event.shiftKey ? -0.8 : 0.8) * byId("detail").clientHeight),
    "+": () => timeline.zoom(0.7), "=": () => timeline.zoom(0.7), "-": () => timeline.zoom(1.4), "0": () => timeline.fit(),
    b: home,
  };
  const NATIVE = new Set(["Enter", " ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"]);

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (state.hits) closeHits();
      else if (state.model && wanted()) clearFilters();
      byId("words").blur();
      if (state.run) byId("tree").focus();
      return;
    }
    if (typing) return;
    if (event.key === "/") byId("words").focus();
    else if (event.key === "?") byId("help").showModal();
    else if (document.body.dataset.view === "runs") {
      const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
      if (!by) return;
      runs.move(by);
    } else if (state.model && ACTIONS[event.key]) {
      // A focused button or summary keeps its own Enter and Space, the detail its scrolling keys.
      if (NATIVE.has(event.key) && event.target.closest("button, summary, .detail")) return;
      if (state.hits && (event.key === "j" || event.key === "k")) openHit(state.hit + (event.key === "j" ? 1 : -1));
      else ACTIONS[event.key](event);
    } else return;
    event.preventDefault();
  });

  byId("ask-help").addEventListener("click", () => byId("help").showModal());
  byId("home").addEventListener("click", home);
  byId("zoom-in").addEventListener("click", () => timeline.zoom(0.7));
  byId("zoom-out").addEventListener("click", () => timeline.zoom(1.4));
  byId("zoom-fit").addEventListener("click", () => timeline.fit());

  // Start

  (async function start() {
    try {
      const asked = new URLSearchParams(location.hash.slice(1));
      const list = await source.runs();
      state.single = list.single;
      if (list.single) return openRun(list.runs[0].id, asked.get("at"));
      if (asked.get("run")) return openRun(asked.get("run"), asked.get("at"));
      home();
    } catch (error) {
      problem(error);
    }
  })();
})();
