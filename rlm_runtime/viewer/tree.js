"use strict";
// The call tree. Only the rows in sight are in the page, so that a hundred thousand calls scroll like ten.

const ROW = 30; // pixels; the same in page.css

class Tree {
  constructor(box, { onSelect, now }) {
    this.box = box;
    this.onSelect = onSelect;
    this.now = now;
    this.rows = [];
    this.at = -1;
    this.drawn = new Map();
    this.space = box.appendChild(el("div", { class: "space", role: "presentation" }));
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (!row) return;
      const index = Number(row.dataset.row);
      const again = index === this.at;
      this.select(index);
      if (event.target.closest(".caret") || again) this.toggle(index);
    });
  }

  /** Show `rows` and keep the selected item selected where it is still there. */
  show(model, open, wanted) {
    this.model = model;
    this.open = open;
    this.wanted = wanted;
    const selected = this.item;
    this.rows = model.rows(open, wanted);
    this.at = selected ? this.rows.findIndex((r) => r.item === selected) : -1;
    this.space.style.height = this.rows.length * ROW + "px";
    this.redraw();
  }

  get item() {
    return this.rows[this.at]?.item ?? null;
  }

  redraw() {
    for (const row of this.drawn.values()) row.remove();
    this.drawn.clear();
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - 6);
    const last = Math.min(this.rows.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + 6);
    for (const [index, row] of this.drawn) {
      if (index < first || index >= last) {
        row.remove();
        this.drawn.delete(index);
      }
    }
    for (let index = first; index < last; index++) {
      if (!this.drawn.has(index)) this.drawn.set(index, this.space.appendChild(this.row(index)));
    }
    if (this.drawn.has(this.at)) this.box.setAttribute("aria-activedescendant", "row-" + this.at);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(index) {
    const { item, level, open, leaf } = this.rows[index];
    const caret = el("span", { class: "caret", "aria-hidden": "true" }, leaf ? "" : open ? "▾" : "▸");
    const time = lasted(item, this.now());
    const label = item.row === "turn" ? this.turnLabel(item) : this.callLabel(item);
    const row = el(
      "div",
      {
        id: "row-" + index, class: `row ${item.row}${item.failed ? " failed" : ""}`, role: "treeitem", "data-row": index,
        "aria-level": level + 1, "aria-selected": index === this.at ? "true" : "false",
        "aria-expanded": leaf ? null : String(open),
      },
      caret,
      label,
      item.calls.length && item.row === "turn" ? el("span", { class: "times-n", title: plural(item.calls.length, "sub-call") }, `×${item.calls.length}`) : null,
      item.failed ? el("span", { class: "bad", title: "failed" }, "failed") : null,
      !item.failed && item.inside ? el("span", { class: "bad soft", title: plural(item.inside, "failure") + " inside" }, `${item.inside} ✕`) : null,
      el("span", { class: "took" }, item.start !== null && item.stop === null && this.model.end === null ? "…" : seconds(time)),
    );
    row.style.top = index * ROW + "px";
    row.style.paddingLeft = 8 + Math.min(level, 12) * 16 + "px";
    return row;
  }

  turnLabel(turn) {
    const reply = this.model.event(turn.replied);
    const code = this.model.event(turn.cells[0]?.begin)?.code;
    const prose = reply ? proseOf(reply.message?.content, turn.cells.map((c) => this.model.event(c.begin)?.code ?? "")) : null;
    const text = (prose && prose[0].replace(THINKING, "")) || code || reply?.message?.content || (reply ? "(empty reply)" : "waiting for the model");
    return el("span", { class: "label" }, el("b", { class: depthClass(turn.node.depth) }, `${turn.number}`), " ", oneLine(text));
  }

  callLabel(node) {
    const begin = this.model.event(node.begin);
    const end = this.model.event(node.finish);
    if (node.top) {
      const run = this.model.event(node.run);
      return el("span", { class: "label" }, el("i", { class: "dot " + depthClass(0) }), el("b", {}, "Root "), oneLine(this.model.roots.length > 1 ? run?.question || run?.root : run?.root));
    }
    const result = end ? (end.error ?? gist(end.value)) : "";
    const kind = node.kind === "rlm" ? "rlm" : node.kind === "tool" ? "tool" : null;
    const prompt = String(begin?.prompt ?? "").slice(this.shared(node));
    return el(
      "span", { class: "label pair" },
      el("i", { class: "dot " + depthClass(node.depth) }),
      kind ? el("span", { class: "kind" }, kind) : null,
      el("span", { class: "says" }, oneLine(node.kind === "rlm" ? begin?.question ?? prompt : prompt, 90) || "(empty prompt)"),
      result ? el("span", { class: "says result" }, "→ " + oneLine(result, 90)) : null,
    );
  }

  /** How many first characters of a prompt its neighbours share: the calls of a batch differ in what comes after. */
  shared(node) {
    const turn = node.caller;
    if (!turn || turn.calls.length < 3) return 0;
    if (turn.sharedOf !== turn.calls.length) {
      const prompts = turn.calls.map((c) => String(this.model.event(c.begin)?.prompt ?? ""));
      let n = prompts[0].length;
      for (const p of prompts) {
        let same = 0;
        while (same < n && p[same] === prompts[0][same]) same++;
        n = same;
      }
      turn.sharedOf = turn.calls.length;
      const line = prompts[0].lastIndexOf("\n", n - 1) + 1; // back to the start of the line, or of the word
      const word = prompts[0].slice(0, n).search(/\S+$/);
      turn.sharedFirst = n <= 24 ? 0 : n - line < 60 ? line : word < 0 ? n : word;
    }
    return turn.sharedFirst;
  }

  select(index, quiet = false) {
    if (!this.rows.length) return;
    const old = this.at;
    this.at = Math.max(0, Math.min(index, this.rows.length - 1));
    this.reveal();
    for (const i of [old, this.at]) this.drawn.get(i)?.setAttribute("aria-selected", String(i === this.at));
    this.box.setAttribute("aria-activedescendant", "row-" + this.at);
    if (!quiet) this.onSelect(this.item);
  }

  reveal() {
    const top = this.at * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top - ROW;
    else if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + 2 * ROW - this.box.clientHeight;
    this.draw();
  }

  /** Select an item, opening what it lies in. */
  go(item, quiet = false) {
    for (let up = above(item); up; up = above(up)) this.open.add(up.id);
    this.show(this.model, this.open, this.wanted);
    let index = this.rows.findIndex((r) => r.item === item);
    if (index < 0 && this.wanted) return false; // hidden by a filter
    this.select(index, quiet);
    return true;
  }

  toggle(index, to = null) {
    const row = this.rows[index];
    if (!row || row.leaf || this.wanted) return;
    const id = row.item.id;
    if (to ?? !this.open.has(id)) this.open.add(id);
    else this.open.delete(id);
    this.show(this.model, this.open, this.wanted);
  }

  move(by) {
    this.select(this.at + by);
  }

  right() {
    const row = this.rows[this.at];
    if (!row || row.leaf) return;
    if (row.open) this.move(1);
    else this.toggle(this.at, true);
  }

  left() {
    const row = this.rows[this.at];
    if (!row) return;
    if (row.open && !this.wanted) return this.toggle(this.at, false);
    const parent = above(row.item);
    if (parent) this.go(parent);
  }

  /** The next row for which `test(item)` holds, in all of the run, open or not. */
  next(test, step = 1) {
    const all = this.model.rows(new Set(), () => true).map((r) => r.item);
    const from = all.indexOf(this.item);
    for (let i = 1; i <= all.length; i++) {
      const item = all[(((from + step * i) % all.length) + all.length) % all.length];
      if (test(item)) return this.go(item);
    }
    return false;
  }
}
