"use strict";
// One item in full: a turn (what was added to the prompt, thinking, reply, code, output, sub-calls) or a call.

class Detail {
  constructor(box, { model, go, now }) {
    Object.assign(this, { box, model, go, now });
    this.opened = new Map(); // which sections a person opened or closed, kept from turn to turn
  }

  show(item) {
    this.item = item;
    const content = item.top ? this.rootView(item) : item.row === "turn" ? this.turnView(item) : this.callView(item);
    this.box.replaceChildren(...content.filter(Boolean));
    this.box.scrollTop = 0;
  }

  /** Numbers of the events an item shows that came cut. */
  cutOf(item) {
    const numbers = item.row === "turn"
      ? [...item.asked, item.replied, ...item.notes, ...item.cells.flatMap((c) => [c.begin, c.finish])]
      : [item.begin, item.finish, item.run, item.end, item.sandbox, ...(item.contexts || [])];
    return numbers.filter((n) => this.model().event(n)?.cut);
  }

  section(title, note, body, open = true) {
    const key = title.replace(/\d+/g, "");
    const box = el(
      "details", { class: "part", open: this.opened.get(key) ?? open },
      el("summary", {}, el("span", { class: "what" }, title), note ? el("span", { class: "note" }, note) : null),
      body,
    );
    box.firstChild.addEventListener("click", () => this.opened.set(key, !box.open));
    return box;
  }

  facts(pairs) {
    return el("p", { class: "facts" }, pairs.filter((p) => p && p[1]).map(([k, v]) => el("span", {}, el("span", { class: "k" }, k), " ", oneLine(v, 200))));
  }

  title(kind, text, item) {
    const up = above(item);
    const name = (i) => (i.top ? "Root" : i.row === "turn" ? `Turn ${i.number}` : i.name);
    const path = [];
    for (let i = up; i; i = above(i)) path.unshift(i);
    return el(
      "header", { class: "title" },
      el("nav", { class: "path", "aria-label": "Where this is" }, path.map((i) => [el("button", { class: "link", onclick: () => this.go(i) }, name(i)), " › "]).flat()),
      el("h2", {}, el("i", { class: "dot " + depthClass(depthOf(item)) }), kind, text ? el("span", { class: "note" }, " ", text) : null,
        item.failed ? el("span", { class: "bad" }, "failed") : null),
    );
  }

  usage(usage) {
    if (!usage) return [];
    const cached = usage.cached_tokens ? ` (${short(usage.cached_tokens)} cached)` : "";
    return [["in", usage.input_tokens ? short(usage.input_tokens) + cached : ""], ["out", usage.output_tokens ? short(usage.output_tokens) : ""], ["cost", dollars(usage.cost_usd)]];
  }

  // A turn

  turnView(turn) {
    const model = this.model();
    const reply = model.event(turn.replied);
    const asked = turn.asked.flatMap((n) => model.event(n).messages || []);
    const waited = turn.thought ? seconds(turn.thought[1] - turn.thought[0]) : "";
    const ran = turn.cells.filter((c) => c.stop !== null).reduce((sum, c) => sum + c.stop - c.start, 0);
    return [
      this.title(`Turn ${turn.number}`, "", turn),
      this.facts([["model", waited], ["cells", ran ? seconds(ran) : ""], ...this.usage(reply?.usage), ["ended", reply && reply.finish_reason !== "stop" ? reply.finish_reason : ""]]),
      asked.length ? this.section("Added to the prompt", `${plural(asked.length, "message")}, ${short(asked.reduce((n, m) => n + String(m.content ?? "").length, 0))} characters`, asked.map((m) => this.message(m)), false) : null,
      ...this.replyView(turn, reply),
      ...turn.notes.map((n) => this.noteView(model.event(n))),
    ];
  }

  message(message) {
    return el("div", { class: "message" }, el("span", { class: "role" }, oneLine(message.role, 20)), block(message.content ?? ""),
      (message.tool_calls || []).map((call) => block(`${call.name}(${asText(call.arguments)})`, "call")));
  }

  replyView(turn, reply) {
    const model = this.model();
    const codes = turn.cells.map((c) => model.event(c.begin)?.code ?? "");
    const cells = turn.cells.filter((c) => c.begin !== null || c.finish !== null || c.calls.length);
    if (!reply) return cells.length ? cells.map((c) => this.cellView(turn, c)) : [el("p", { class: "quiet" }, model.end === null ? "The model is thinking …" : "No reply was recorded.")];
    const content = String(reply.message?.content ?? "");
    const thinking = thinkingOf(reply.raw ?? content);
    const prose = proseOf(content.replace(THINKING, ""), codes);
    const parts = [];
    if (thinking) parts.push(this.section("Thinking", short(thinking.length) + " characters", block(thinking, "thinking"), thinking.length < 1500));
    if (prose) {
      prose.forEach((text, i) => {
        if (text) parts.push(block(text, "prose"));
        if (i < cells.length) parts.push(this.cellView(turn, cells[i]));
      });
    } else {
      parts.push(this.section("Reply", "", [block(content, "prose"), (reply.message?.tool_calls || []).map((c) => block(`${c.name}(${asText(c.arguments)})`, "call"))]));
      parts.push(...cells.map((c) => this.cellView(turn, c)));
    }
    if (!content && !cells.length) parts.push(el("p", { class: "quiet" }, "The reply was empty."));
    if (reply.raw !== null && reply.raw !== undefined) {
      const cut = reply.discarded ? `${count(reply.discarded)} characters were not kept` : "as it came";
      parts.push(this.section("Whole reply", cut, block(reply.raw), false));
    }
    return parts;
  }

  cellView(turn, cell) {
    const model = this.model();
    const code = model.event(cell.begin)?.code;
    const result = model.event(cell.finish)?.result;
    const title = turn.cells.length > 1 ? `Cell ${cell.number}` : "Code";
    const status = result && result.status !== "ok" ? el("span", { class: "bad" }, result.status) : null;
    const time = result ? [["wall", seconds(result.wall_seconds)], ["CPU", result.cpu_seconds ? seconds(result.cpu_seconds) : ""], ["waiting for calls", result.waited_seconds ? seconds(result.waited_seconds) : ""]] : [];
    return el(
      "section", { class: "cell " + depthClass(turn.node.depth), "aria-label": title },
      el("div", { class: "cell-head" }, el("span", { class: "what" }, title), status, this.facts(time)),
      code === undefined ? null : block(code, "code", true),
      cell.calls.length ? this.callsView(cell.calls) : null,
      result ? this.resultView(result) : el("p", { class: "quiet" }, model.end === null ? "running …" : "It did not come to an end."),
    );
  }

  resultView(result) {
    const answer = result.answer || {};
    const variables = Object.entries(result.variables || {});
    const cut = (name) => (result[name + "_chars"] > String(result[name] ?? "").length ? `${count(result[name + "_chars"])} characters, the middle cut` : "");
    const empty = !result.stdout && !result.stderr && !result.error;
    return el(
      "div", { class: "result-box" },
      result.stdout ? [el("div", { class: "sub" }, "Output", el("span", { class: "note" }, cut("stdout"))), block(result.stdout, "out")] : null,
      result.stderr ? [el("div", { class: "sub" }, "Standard error", el("span", { class: "note" }, cut("stderr"))), block(result.stderr, "out err")] : null,
      result.error ? [el("div", { class: "sub bad-text" }, oneLine(`${result.error.type}: ${result.error.message}`, 300)), result.error.traceback ? block(result.error.traceback, "out err") : null] : null,
      result.lost ? el("p", { class: "lost" }, oneLine(result.lost, 600)) : null,
      empty && !answer.ready ? el("p", { class: "quiet" }, "No output.") : null,
      answer.ready ? el("div", { class: "answer" }, el("span", { class: "what" }, "answer, ready"), block(asText(answer.content))) : null,
      variables.length ? el("details", { class: "vars" }, el("summary", {}, plural(variables.length, "variable")),
        el("table", {}, variables.map(([k, v]) => el("tr", {}, el("th", { scope: "row" }, oneLine(k)), el("td", {}, oneLine(v, 300)))))) : null,
    );
  }

  /** Calls of a cell as a small waterfall; each line goes to its call. */
  callsView(calls) {
    const model = this.model();
    const from = Math.min(...calls.map((c) => c.start));
    const to = Math.max(...calls.map((c) => c.stop ?? this.now()), from + 1e-6);
    const shown = 12;
    const line = (node) => {
      const bar = el("i", { class: (node.failed ? "fail" : depthClass(node.depth)) });
      bar.style.left = (100 * (node.start - from)) / (to - from) + "%";
      bar.style.width = Math.max((100 * ((node.stop ?? this.now()) - node.start)) / (to - from), 0.8) + "%";
      const end = model.event(node.finish);
      const text = end ? end.error ?? gist(end.value) : "…";
      return el("button", { class: "fall", onclick: () => this.go(node), title: node.name },
        el("span", { class: "strip" }, bar), el("span", { class: "took" }, seconds(lasted(node, this.now()))),
        el("span", { class: "gist" + (node.failed ? " bad-text" : "") }, (node.kind === "rlm" ? "rlm → " : "") + oneLine(text, 120)));
    };
    const list = el("div", { class: "falls" }, calls.slice(0, shown).map(line));
    if (calls.length > shown) {
      list.append(el("button", { class: "more", onclick: (e) => e.target.replaceWith(...calls.slice(shown, 2000).map(line)) }, `Show ${calls.length - shown} more`));
    }
    const failed = calls.filter((c) => c.failed).length;
    return el("div", { class: "calls" }, el("div", { class: "sub" }, plural(calls.length, "sub-call"), el("span", { class: "note" }, seconds(to - from), failed ? `, ${failed} failed` : "")), list);
  }

  noteView(event) {
    if (event.type === "nudged") return el("aside", { class: "aside" }, el("span", { class: "what" }, "The model was told"), el("span", { class: "note" }, oneLine(event.reason)), block(event.text, "prose"));
    if (event.type === "compacted") {
      return el("aside", { class: "aside" }, el("span", { class: "what" }, "History compacted"), el("span", { class: "note" }, `${short(event.tokens_before)} → ${short(event.tokens_after)} tokens`), block(event.summary, "prose"));
    }
    return el("aside", { class: "aside" }, el("span", { class: "what" }, "A limit refused a call"), el("span", { class: "note" }, oneLine(event.refused)));
  }

  // A call

  callView(node) {
    const model = this.model();
    const begin = model.event(node.begin);
    const end = model.event(node.finish);
    const kinds = { lm: "LM call", rlm: "Child RLM", tool: "Tool call" };
    return [
      this.title(`${kinds[node.kind] ?? "Call"} ${oneLine(node.name, 60)}`, "", node),
      this.facts([["model", node.model], ["time", seconds(lasted(node, this.now()))], ...this.usage(end?.usage), ["turns", node.turns.length ? String(node.turns.length) : ""]]),
      end && end.error !== null && end.error !== undefined ? el("div", { class: "result-box" }, el("div", { class: "sub bad-text" }, `Failed (${oneLine(end.kind ?? "error")})`), block(end.error, "out err")) : null,
      end && (end.error === null || end.error === undefined) ? el("div", { class: "answer" }, el("span", { class: "what" }, "Reply"), block(asText(end.value))) : null,
      end ? null : el("p", { class: "quiet" }, model.end === null ? "running …" : "It did not come to an end."),
      begin?.question ? this.section("Question", "", block(begin.question, "prose")) : null,
      node.turns.length ? this.section("Turns", plural(node.turns.length, "turn"), el("div", { class: "falls" }, node.turns.map((t) => this.turnLine(t)))) : null,
      !node.turns.length && node.calls.length ? this.section("Tool calls", "", this.callsView(node.calls)) : null,
      begin ? this.section(node.kind === "rlm" ? "Its context" : node.kind === "tool" ? "Arguments" : "Prompt", "", block(begin.prompt)) : null,
      node.kind === "rlm" ? this.sandboxView(model.event(node.sandbox), false) : null,
    ];
  }

  turnLine(turn) {
    const code = this.model().event(turn.cells[0]?.begin)?.code ?? this.model().event(turn.replied)?.message?.content ?? "…";
    return el("button", { class: "fall", onclick: () => this.go(turn) }, el("span", { class: "took" }, `${turn.number}`), el("span", { class: "gist" }, oneLine(code, 140)));
  }

  // The root

  rootView(root) {
    const model = this.model();
    const run = model.event(root.run);
    const end = model.event(root.end);
    const kept = run && { budget: run.budget, settings: run.settings };
    return [
      el("header", { class: "title" }, el("h2", {}, el("i", { class: "dot d0" }), "The run ", el("span", { class: "note" }, oneLine(run?.run)))),
      run?.question ? this.section("Question", "", block(run.question, "prose")) : null,
      end ? el("div", { class: "answer" }, el("span", { class: "what" }, "Answer"), end.answer === null || end.answer === undefined ? el("p", { class: "quiet" }, "None.") : block(asText(end.answer))) : null,
      end?.error ? el("div", { class: "result-box" }, el("div", { class: "sub bad-text" }, "Error"), block(end.error, "out err")) : null,
      ...root.contexts.map((n) => this.contextView(model.event(n))),
      this.sandboxView(model.event(root.sandbox)),
      kept ? this.section("Settings", "", block(JSON.stringify(kept, null, 2)), false) : null,
      ...model.damaged.map((n) => el("aside", { class: "aside" }, el("span", { class: "what" }, "A damaged line"), el("span", { class: "note" }, oneLine(model.event(n).problem)), block(model.event(n).text))),
    ];
  }

  contextView(event) {
    const size = event.chars !== null && event.chars !== undefined ? count(event.chars) + " characters" : event.bytes ? count(event.bytes) + " bytes" : "";
    return this.section(`Context: ${oneLine(event.name, 40)}`, [event.kind, size].filter(Boolean).join(", "),
      [this.facts([["path", event.path], ["blob", event.blob], ["sha256", event.sha256]]), event.preview ? block(event.preview) : null]);
  }

  sandboxView(event, open = true) {
    if (!event) return null;
    const rows = Object.entries(event.layers || {}).map(([k, v]) => el("tr", {}, el("th", { scope: "row" }, oneLine(k)), el("td", { class: isActive(v) ? "" : "bad-text" }, oneLine(v, 200))));
    return this.section("Sandbox", `${oneLine(event.environment)}, up in ${seconds(event.start_seconds)}`, el("table", { class: "plain" }, rows), open);
  }
}
