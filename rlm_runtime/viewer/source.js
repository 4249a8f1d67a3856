"use strict";
// Where runs come from: the server that sent the page, or the data inside an exported page.

class ServerSource {
  constructor() {
    this.live = true;
  }

  async ask(what, query = {}) {
    const response = await fetch(`api/${what}?${new URLSearchParams(query)}`, { credentials: "omit" });
    const body = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(body.error || `the server answered ${response.status}`);
    return body;
  }

  runs() {
    return this.ask("runs");
  }

  events(run, from) {
    return this.ask("events", { run, from });
  }

  event(run, number) {
    return this.ask("event", { run, number });
  }

  search(run, words) {
    return this.ask("search", { run, words });
  }
}

class PageSource {
  constructor(data) {
    this.data = data;
    this.live = false;
  }

  async runs() {
    return { runs: [{ id: this.data.run }], single: true };
  }

  async events(_run, from) {
    const events = this.data.events.slice(from);
    return { events, next: this.data.events.length, complete: true };
  }

  async event(_run, number) {
    return this.data.events[number];
  }

  async search(_run, words, most = 500) {
    const wanted = new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "i");
    const hits = [];
    for (const [number, event] of this.data.events.entries()) {
      for (const [field, text] of textsOf(event)) {
        const found = wanted.exec(text);
        if (!found) continue;
        const end = found.index + found[0].length;
        hits.push({ event: number, field, before: text.slice(Math.max(0, found.index - 40), found.index),
          match: found[0], after: text.slice(end, end + 80) });
        if (hits.length >= most) return { hits, more: true };
      }
    }
    return { hits, more: false };
  }
}

const SKIPPED = new Set(["type", "node", "parent", "role", "t", "finish_reason", "kind"]);

function* textsOf(value, field = "") {
  if (typeof value === "string") yield [field, value];
  else if (Array.isArray(value)) for (const inner of value) yield* textsOf(inner, field);
  else if (value && typeof value === "object") {
    for (const [key, inner] of Object.entries(value)) {
      if (field || !SKIPPED.has(key)) yield* textsOf(inner, field ? `${field}.${key}` : key);
    }
  }
}

function findSource() {
  const data = byId("data");
  return data ? new PageSource(JSON.parse(data.textContent)) : new ServerSource();
}
