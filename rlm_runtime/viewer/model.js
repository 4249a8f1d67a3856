"use strict";
// A run built from its events, one at a time, so that a live run grows without starting over. Events arrive in order but
// are not trusted: a field may be missing or of the wrong type, a node may end without having begun.

class Model {
  constructor() {
    this.events = [];
    this.nodes = new Map();
    this.roots = []; // one for each completion of a session; most runs have one
    this.damaged = [];
    this.base = 0; // when the latest completion began: each counts its time from zero
    this.last = 0; // the latest time seen, seconds
    this.failures = 0;
    this.of = []; // event number -> the item (turn or node) it belongs to
    this.begin();
  }

  begin() {
    this.base = this.roots.length ? this.last + 0.02 * this.last : 0;
    this.prefix = this.roots.length ? this.roots.length + "/" : "";
    this.root = this.node("0", { kind: "rlm", depth: 0, top: true, contexts: [], run: null, end: null, sandbox: null });
    this.roots.push(this.root);
  }

  get end() {
    return this.root.end;
  }

  event(number) {
    return number === null || number === undefined ? null : this.events[number];
  }

  node(name, fields = {}) {
    name = String(name ?? "0");
    const id = this.prefix + name;
    let node = this.nodes.get(id);
    if (!node) {
      node = { row: "node", id, name, top: false, parent: null, kind: "lm", model: "", depth: name.split(".").length - 1, calls: [],
        turns: [], begin: null, finish: null, start: this.base, stop: null, failed: false, inside: 0 };
      this.nodes.set(id, node);
    }
    return Object.assign(node, fields);
  }

  turn(node, number) {
    number = Number(number) || 0;
    let turn = node.turns.find((t) => t.number === number);
    if (!turn) {
      turn = { row: "turn", id: `${node.id}#${number}`, node, number, asked: [], replied: null, cells: [], calls: [], notes: [],
        start: null, stop: null, failed: false, inside: 0 };
      node.turns.push(turn);
    }
    return turn;
  }

  cell(turn, number) {
    number = Number(number) || 0;
    let cell = turn.cells.find((c) => c.number === number);
    if (!cell) turn.cells.push((cell = { number, begin: null, finish: null, calls: [], start: null, stop: null }));
    return cell;
  }

  add(events) {
    for (const event of events) {
      const number = this.events.length;
      this.events.push(event);
      this.of[number] = this.take(event, number) || this.root;
    }
  }

  /** The whole of an event that came cut. */
  replace(number, event) {
    this.events[number] = event;
  }

  take(event, number) {
    if (event.type === "run_start" && (event.node ?? "0") === "0" && this.root.run !== null) this.begin();
    const t = this.base + (Number(event.t) || 0);
    this.last = Math.max(this.last, t);
    switch (event.type) {
      case "node_start": {
        const parent = this.node(event.parent);
        const node = this.node(event.node, { parent, kind: event.kind, model: event.model || "", begin: number, start: t });
        if (Number.isFinite(event.depth)) node.depth = event.depth;
        parent.calls.push(node);
        if (parent.kind !== "rlm") {
          node.caller = parent; // a tool that a plain call used
          return node;
        }
        const turn = this.turn(parent, event.turn);
        turn.start ??= t;
        turn.calls.push(node);
        node.caller = turn;
        this.cell(turn, event.cell).calls.push(node);
        return node;
      }
      case "node_end": {
        const node = this.node(event.node);
        node.finish = number;
        node.stop = t;
        if (node.begin === null) node.start = t - (Number(event.seconds) || 0);
        if (event.error !== null && event.error !== undefined) this.fail(node);
        return node;
      }
    }
    const node = this.node(event.node);
    const turn = "turn" in event ? this.turn(node, event.turn) : null;
    if (turn) {
      turn.start ??= t;
      turn.stop = Math.max(turn.stop ?? t, t);
    }
    switch (event.type) {
      case "run_start":
        node.run = number;
        return node;
      case "run_end":
        node.end = number;
        node.stop = t;
        if (event.error !== null && event.error !== undefined && !event.answer) this.fail(node);
        return node;
      case "context":
        (node.contexts ??= []).push(number);
        return node;
      case "sandbox":
        node.sandbox = number;
        return node;
      case "asked":
        turn.asked.push(number);
        return turn;
      case "replied":
        turn.replied = number;
        turn.thought = [t - (Number(event.seconds) || 0), t];
        turn.start = Math.min(turn.start, turn.thought[0]);
        return turn;
      case "cell_start": {
        const cell = this.cell(turn, event.cell);
        cell.begin = number;
        cell.start = t;
        return turn;
      }
      case "cell_end": {
        const cell = this.cell(turn, event.cell);
        cell.finish = number;
        cell.stop = t;
        if (event.result && event.result.status !== "ok") this.fail(turn);
        return turn;
      }
      case "nudged":
      case "compacted":
        turn.notes.push(number);
        return turn;
      case "budget": {
        const latest = node.turns[node.turns.length - 1];
        if (event.refused && latest) latest.notes.push(number);
        if (latest) latest.budget = number;
        return latest || node;
      }
      case "damaged":
        this.damaged.push(number);
        return this.root;
      default:
        return turn || node;
    }
  }

  /** Mark an item as failed, and what it lies in as having a failure inside. */
  fail(item) {
    if (item.failed) return;
    item.failed = true;
    this.failures++;
    for (let up = above(item); up; up = above(up)) up.inside++;
  }

  get deepest() {
    let most = 0;
    for (const node of this.nodes.values()) most = Math.max(most, node.depth);
    return most;
  }

  /** Tokens, cost and calls a depth: as recorded at the end, else summed over what there is. */
  byDepth() {
    const sums = [];
    const add = (depth, usage, calls) => {
      const sum = (sums[depth] ??= { calls: 0, input: 0, output: 0, cached: 0, cost: null });
      sum.calls += calls;
      if (!usage) return;
      sum.input += Number(usage.input_tokens) || 0;
      sum.output += Number(usage.output_tokens) || 0;
      sum.cached += Number(usage.cached_tokens) || 0;
      if (Number.isFinite(usage.cost_usd)) sum.cost = (sum.cost ?? 0) + usage.cost_usd;
    };
    for (const node of this.nodes.values()) {
      const ended = this.event(node.finish);
      if (!node.top && node.kind !== "rlm") add(node.depth, ended && ended.usage, node.kind === "tool" ? 0 : 1);
      for (const turn of node.turns) {
        const reply = this.event(turn.replied);
        if (reply) add(node.depth, reply.usage, 1);
      }
    }
    return sums;
  }

  /** The items as a flat list of rows, those of closed items left out. `wanted(item)`, if given, filters. */
  rows(open, wanted = null) {
    const rows = [];
    const walk = (item, level) => {
      const at = rows.length;
      rows.push({ item, level, open: false, leaf: true });
      const inside = item.row === "node" && item.turns.length ? item.turns : item.calls;
      rows[at].leaf = inside.length === 0;
      rows[at].open = !rows[at].leaf && (wanted !== null || open.has(item.id));
      if (rows[at].open) for (const child of inside) walk(child, level + 1);
      if (wanted && rows.length === at + 1 && !wanted(item)) rows.pop();
    };
    for (const root of this.roots) walk(root, 0);
    return rows;
  }
}

function above(item) {
  return item.row === "turn" ? item.node : item.caller || null;
}

function depthOf(item) {
  return item.row === "turn" ? item.node.depth : item.depth;
}

function lasted(item, now) {
  if (item.start === null) return null;
  return (item.stop ?? now) - item.start;
}

/** A turn's reply without its fences: the prose before, between and after the cells, and the thinking in it. */
function proseOf(content, codes) {
  let rest = String(content ?? "");
  const parts = [];
  for (const code of codes) {
    const at = code ? rest.indexOf(code.trim()) : -1;
    if (at < 0) return null; // the code came in another form (a tool call, XML): show the reply as it is
    parts.push(rest.slice(0, at));
    rest = rest.slice(at + code.trim().length);
  }
  parts.push(rest);
  return parts.map((part, i) => {
    if (i > 0) part = part.replace(/^\s*(`{3,}|~{3,})[^\n]*/, "");
    if (i < codes.length) part = part.replace(/(`{3,}|~{3,})[^\n`]*\s*$/, "");
    return part.trim();
  });
}

const THINKING = /<(think|thinking|reasoning)>([^]*?)(?:<\/\1>|$)/gi;

function thinkingOf(text) {
  return [...String(text ?? "").matchAll(THINKING)].map((m) => m[2].trim()).filter(Boolean).join("\n\n");
}
