"use strict";
// The list of runs of a folder, and the head of one run.

class Runs {
  constructor(box, onOpen) {
    this.box = box;
    this.onOpen = onOpen;
    this.runs = [];
  }

  show(runs) {
    const focused = this.box.contains(document.activeElement) ? document.activeElement.dataset.run : null;
    this.runs = runs;
    this.box.replaceChildren(
      el("h1", {}, plural(runs.length, "run")),
      runs.length ? el("div", { class: "cards" }, runs.map((run) => this.card(run))) : el("p", { class: "quiet" }, "No runs here yet. This page shows them as they start."),
    );
    if (focused) [...this.box.querySelectorAll("[data-run]")].find((c) => c.dataset.run === focused)?.focus();
  }

  card(run) {
    const usage = run.usage || {};
    const fresh = !run.complete && Date.now() / 1000 - run.modified < 30;
    return el(
      "button", { class: "card", "data-run": run.id, onclick: () => this.onOpen(run.id) },
      el("span", { class: "card-top" }, stopPill(run.complete ? run.stop_reason : fresh ? "live" : "unfinished"), el("span", { class: "k" }, oneLine(run.id, 80)), el("span", { class: "grow" }), el("span", { class: "k" }, when(run.started_at))),
      el("span", { class: "q" }, oneLine(run.question, 240) || el("span", { class: "quiet" }, "(the prompt is the question)")),
      run.answer || run.error ? el("span", { class: "a" + (run.error && !run.answer ? " bad-text" : "") }, oneLine(run.answer || run.error, 240)) : null,
      el("span", { class: "facts" }, [
        ["", [run.root, run.sub].filter(Boolean).join(" → ")], ["turns", run.turns], ["tokens", usage.input_tokens ? short(usage.input_tokens + (usage.output_tokens || 0)) : ""],
        ["cost", dollars(usage.cost_usd)], ["time", seconds(run.seconds)]].filter((p) => p[1]).map(([k, v]) => el("span", {}, el("span", { class: "k" }, k), " ", oneLine(v, 120)))),
    );
  }

  move(by) {
    const cards = [...this.box.querySelectorAll("[data-run]")];
    const at = cards.indexOf(document.activeElement);
    cards[Math.max(0, Math.min(at + by, cards.length - 1))]?.focus();
  }
}

function when(iso) {
  const date = new Date(iso);
  return Number.isNaN(date.getTime()) ? "" : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function stopPill(reason) {
  const kind = reason === "answered" ? "good" : reason === "live" ? "going" : /^(error|cancelled)/.test(reason) ? "bad" : "warn";
  return el("span", { class: "pill " + kind }, oneLine(reason, 40));
}

/** Question, answer, facts and the chart by depth. */
function headOf(model, now) {
  const run = model.event(model.root.run) || {};
  const end = model.event(model.root.end);
  const sandbox = model.event(model.roots[0].sandbox);
  const context = model.event(model.root.contexts[0] ?? model.roots[0].contexts[0]);
  const turns = model.roots.reduce((sum, root) => sum + root.turns.length, 0);
  const session = model.roots.length > 1;
  const sums = model.byDepth();
  const total = sums.filter(Boolean).reduce((a, b) => ({ calls: a.calls + b.calls, input: a.input + b.input, output: a.output + b.output, cost: b.cost === null ? a.cost : (a.cost ?? 0) + b.cost }), { calls: 0, input: 0, output: 0, cost: null });
  const answer = end ? asText(end.answer ?? "") : "";
  const size = context && (context.chars ?? context.bytes);
  const fact = (name, value, title) => (value ? el("div", { class: "fact", title }, el("span", { class: "k" }, name), el("b", {}, oneLine(value, 80))) : null);
  const layers = sandbox ? Object.entries(sandbox.layers || {}) : [];
  return [
    el("div", { class: "qa" },
      el("h1", { title: "Question" }, oneLine(run.question, 400) || "(the prompt is the question)"),
      el("p", { class: "outcome" }, stopPill(end ? end.stop_reason : now.live ? "live" : "unfinished"), " ",
        el("span", { class: end?.error && !answer ? "bad-text" : "" }, oneLine(answer || end?.error || (end ? "no answer" : now.live ? "no answer yet" : "the record ends before the run did"), 400))),
      el("div", { class: "layers" }, el("span", { class: "k" }, sandbox ? `sandbox ${oneLine(sandbox.environment, 30)}` : "sandbox not recorded"),
        layers.map(([k, v]) => el("span", { class: "layer " + (isActive(v) ? "good" : "bad"), title: visible(v).slice(0, 300) }, oneLine(k, 30))))),
    el("div", { class: "facts-grid" },
      fact("root", run.root), fact("sub", run.sub), fact("context", size ? short(size) + (context.chars ? " chars" : " bytes") : context?.kind),
      fact("turns", turns + (session ? ` in ${model.roots.length} completions` : "")), fact("sub-calls", count(model.nodes.size - model.roots.length)),
      fact("time", seconds((!session && end?.seconds) || now.time)),
      fact("tokens in", short(total.input)), fact("tokens out", short(total.output)), fact("cost", dollars(total.cost) || "unknown")),
    depthChart(sums),
  ];
}

function depthChart(sums) {
  const most = Math.max(...sums.filter(Boolean).map((s) => s.input + s.output), 1);
  const dear = Math.max(...sums.filter(Boolean).map((s) => s.cost ?? 0), 1e-12);
  const bar = (kind, share) => {
    const part = el("i", { class: kind });
    part.style.width = Math.max(100 * share, share > 0 ? 1 : 0) + "%";
    return part;
  };
  const rows = Object.entries(sums).map(([depth, s]) =>
    el("tr", { title: `depth ${depth}: ${count(s.input)} tokens in (${count(s.cached)} cached), ${count(s.output)} out, ${dollars(s.cost) || "cost unknown"}` },
      el("th", { scope: "row" }, `depth ${depth}`), el("td", { class: "n" }, count(s.calls)),
      el("td", { class: "n" }, short(s.input + s.output)), el("td", { class: "chart" }, el("span", {}, bar(depthClass(depth), (s.input + s.output) / most))),
      el("td", { class: "n" }, dollars(s.cost)), el("td", { class: "chart" }, el("span", {}, bar(depthClass(depth), (s.cost ?? 0) / dear)))));
  return el("table", { class: "depths", "aria-label": "Tokens and cost by depth" },
    el("thead", {}, el("tr", {}, el("td"), ["calls", "tokens", "", "cost", ""].map((h) => (h ? el("th", { scope: "col", class: "n" }, h) : el("td"))))), el("tbody", {}, rows));
}
