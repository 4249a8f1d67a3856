"use strict";
// When what ran: the root's turns on top (thinking full, cells pale), below them the calls of each depth, packed into
// lanes so that calls that ran at once lie below each other.

const AXIS = 18;
const LABEL = 58;

class Timeline {
  constructor(canvas, tip, { onSelect, describe, now }) {
    Object.assign(this, { canvas, tip, onSelect, describe, now });
    this.from = 0;
    this.to = null; // null: to the end, also while it grows
    this.bars = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("mousemove", (event) => this.hover(event));
    canvas.addEventListener("mouseleave", () => (this.tip.hidden = true));
    canvas.addEventListener("click", (event) => {
      if (this.dragged) return;
      const bar = this.find(event);
      if (bar) this.onSelect(bar.item);
    });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return; // plain scrolling stays the page's
      event.preventDefault();
      this.zoom(event.deltaY + event.deltaX < 0 ? 0.8 : 1.25, this.timeAt(event.offsetX));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      this.dragged = false;
      this.grab = { x: event.offsetX, from: this.from, to: this.end };
    });
    addEventListener("pointerup", () => (this.grab = null));
    canvas.addEventListener("dblclick", () => this.fit());
  }

  show(model) {
    this.model = model;
    this.lay();
    this.draw();
  }

  get end() {
    return this.to ?? Math.max(this.now(), 0.001);
  }

  /** Bars and the lanes they lie in. */
  lay() {
    const bars = [];
    const bands = []; // by depth: the times at which its lanes become free
    const now = this.now();
    for (const turn of this.model.roots.flatMap((root) => root.turns)) {
      if (turn.thought) bars.push({ item: turn, start: turn.thought[0], stop: turn.thought[1], depth: 0, lane: 0, failed: false });
      for (const cell of turn.cells) {
        if (cell.start === null) continue;
        bars.push({ item: turn, start: cell.start, stop: cell.stop ?? now, depth: 0, lane: 0, pale: true, failed: turn.failed });
      }
      if (!turn.thought && !turn.cells.length && turn.start !== null) bars.push({ item: turn, start: turn.start, stop: now, depth: 0, lane: 0 });
    }
    bands[0] = [0];
    const calls = [...this.model.nodes.values()].filter((n) => !n.top).sort((a, b) => a.start - b.start);
    for (const node of calls) {
      const band = (bands[node.depth] ??= []);
      const stop = node.stop ?? now;
      let lane = band.findIndex((free) => free <= node.start + 1e-9);
      if (lane < 0) lane = band.length;
      band[lane] = stop;
      bars.push({ item: node, start: node.start, stop, depth: node.depth, lane, failed: node.failed, pale: node.kind === "rlm" });
    }
    this.bars = bars;
    this.bands = bands.map((band, depth) => ({ depth, lanes: band.length })).filter(Boolean);
  }

  /** Where each band lies, for the canvas' height. */
  place(height) {
    const gap = 5;
    const bands = this.bands;
    const room = height - AXIS - 6 - gap * (bands.length - 1);
    const lanes = bands.reduce((sum, b) => sum + (b.depth === 0 ? 0 : b.lanes), 0);
    const first = Math.min(16, room);
    const lane = Math.max(Math.min((room - first) / Math.max(lanes, 1), 12), 0.5);
    let top = 4;
    for (const band of bands) {
      band.top = top;
      band.lane = band.depth === 0 ? first : lane;
      band.height = band.lane * band.lanes;
      top += band.height + gap;
    }
  }

  x(time) {
    return LABEL + ((time - this.from) / (this.end - this.from)) * (this.width - LABEL - 8);
  }

  timeAt(x) {
    return this.from + ((x - LABEL) / (this.width - LABEL - 8)) * (this.end - this.from);
  }

  draw() {
    if (!this.model || !this.canvas.clientWidth) return;
    const ratio = devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const depths = [0, 1, 2, 3, 4, 5].map((d) => colour("d" + d));
    const [bad, ink, line, mark] = ["bad", "soft", "line", "mark"].map(colour);
    this.place(this.height);
    pen.font = `11px ${style.getPropertyValue("--sans")}`;
    pen.textBaseline = "middle";
    this.axis(pen, ink, line);
    if (this.chosen) {
      const [a, b] = [this.x(this.chosen.start ?? 0), this.x(this.chosen.stop ?? this.now())];
      pen.fillStyle = mark;
      pen.fillRect(Math.max(a, LABEL) - 1, 0, Math.max(b - Math.max(a, LABEL), 1) + 2, this.height - AXIS);
    }
    for (const band of this.bands) {
      pen.fillStyle = ink;
      pen.textAlign = "left";
      if (band.height >= 8) pen.fillText(band.depth === 0 ? "root" : `depth ${band.depth}`, 8, band.top + Math.min(band.height / 2, 30));
    }
    pen.save();
    pen.beginPath();
    pen.rect(LABEL, 0, this.width - LABEL, this.height);
    pen.clip();
    for (const bar of this.bars) {
      const box = this.box(bar);
      if (box.x > this.width || box.x + box.w < LABEL) continue;
      pen.globalAlpha = bar.pale ? 0.4 : 1;
      pen.fillStyle = bar.failed ? bad : depths[Math.min(bar.depth, 5)];
      pen.fillRect(box.x, box.y, box.w, box.h);
      if (bar.item === this.chosen && bar.item.row === "node") {
        pen.globalAlpha = 1;
        pen.strokeStyle = style.color;
        pen.lineWidth = 1.5;
        pen.strokeRect(box.x - 1, box.y - 1, box.w + 2, box.h + 2);
      }
    }
    pen.restore();
    const calls = this.bars.length;
    this.canvas.setAttribute("aria-label", `Timeline: ${plural(calls, "bar")} over ${seconds(this.now())}; the call tree lists the same.`);
  }

  axis(pen, ink, line) {
    const span = this.end - this.from;
    const rough = span / Math.max(2, (this.width - LABEL) / 110);
    const ten = 10 ** Math.floor(Math.log10(rough));
    const round = rough > 5 ? [10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400] : [1, 2, 5, 10].map((m) => m * ten);
    const step = round.find((s) => s >= rough) ?? 10 * ten;
    pen.textAlign = "center";
    for (let t = Math.ceil(this.from / step) * step; t <= this.end; t += step) {
      const x = this.x(t);
      pen.fillStyle = line;
      pen.fillRect(x, 0, 1, this.height - AXIS + 3);
      pen.fillStyle = ink;
      if (x < this.width - 110) pen.fillText(t === 0 ? "0" : seconds(Number(t.toPrecision(6))).replace(/\.0+ | 00 s$/, (zeros) => (zeros[0] === "." ? " " : "")), x, this.height - AXIS / 2 + 1);
    }
  }

  box(bar) {
    const band = this.bands.find((b) => b.depth === bar.depth);
    const x = this.x(bar.start);
    const gap = band.lane > 4 ? 1 : band.lane > 2 ? 0.5 : 0;
    return { x, y: band.top + bar.lane * band.lane, w: Math.max(this.x(bar.stop) - x - 0.5, 1.2), h: Math.max(band.lane - gap, 0.5) };
  }

  find(event) {
    const near = 2;
    for (let i = this.bars.length - 1; i >= 0; i--) {
      const box = this.box(this.bars[i]);
      const inside = event.offsetX >= box.x - near && event.offsetX <= box.x + box.w + near && event.offsetY >= box.y && event.offsetY <= box.y + Math.max(box.h, 2);
      if (inside) return this.bars[i];
    }
    return null;
  }

  hover(event) {
    if (!this.model) return;
    if (this.grab && Math.abs(event.offsetX - this.grab.x) > 3) {
      this.dragged = true;
      const by = ((this.grab.x - event.offsetX) / (this.width - LABEL)) * (this.grab.to - this.grab.from);
      const most = this.now() - (this.grab.to - this.grab.from);
      this.from = Math.max(0, Math.min(this.grab.from + by, most));
      this.to = this.from + this.grab.to - this.grab.from;
      this.draw();
      return;
    }
    const bar = this.find(event);
    this.canvas.style.cursor = bar ? "pointer" : this.to === null ? "default" : "grab";
    this.tip.hidden = !bar;
    if (!bar) return;
    this.tip.replaceChildren(...this.describe(bar));
    const { innerWidth, innerHeight } = window;
    this.tip.style.left = Math.min(event.clientX + 12, innerWidth - this.tip.offsetWidth - 8) + "px";
    const below = event.clientY + 16;
    this.tip.style.top = (below + this.tip.offsetHeight > innerHeight ? event.clientY - this.tip.offsetHeight - 8 : below) + "px";
  }

  choose(item) {
    this.chosen = item.top ? null : item;
    this.draw();
  }

  zoom(by, at = (this.from + this.end) / 2) {
    const all = Math.max(this.now(), 0.001);
    const span = Math.min(Math.max((this.end - this.from) * by, all / 2000), all);
    const share = (at - this.from) / (this.end - this.from);
    this.from = Math.max(0, Math.min(at - share * span, all - span));
    this.to = span >= all * 0.999 ? null : this.from + span;
    if (this.to === null) this.from = 0;
    this.draw();
  }

  fit() {
    this.from = 0;
    this.to = null;
    this.draw();
  }
}
