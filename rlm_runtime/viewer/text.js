"use strict";
// From text to the page. Nothing a model or a cell wrote is ever parsed as markup: it goes in through text nodes only.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

/** Whether a layer of the sandbox is as it should be: the worker says "active (...)", of its variables "scrubbed". */
const isActive = (state) => /^(active|scrubbed|on|yes)\b/.test(state);

const byId = (id) => document.getElementById(id);

// Characters that would hide, reorder or imitate: control codes (ANSI escapes), bidi overrides, zero widths, lone halves.
const HIDDEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\ud800-\udfff]|[\u{e0000}-\u{e007f}]/gu;
const MOST_MARKS = 1000; // beyond, marks are plain text: a block full of them must not freeze the page

function nameOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

function visible(text) {
  return String(text).replaceAll("\r\n", "\n").replace(HIDDEN, (c) => (c < " " ? nameOf(c) : `[${nameOf(c)}]`));
}

/** Append `text` to `parent`, hidden characters as marks. */
function write(parent, text) {
  text = String(text).replaceAll("\r\n", "\n");
  let from = 0;
  let marks = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (marks++ >= MOST_MARKS) break;
    if (match.index > from) parent.append(text.slice(from, match.index));
    const mark = el("span", { class: "hid", title: "U+" + match[0].codePointAt(0).toString(16).padStart(4, "0") });
    mark.textContent = nameOf(match[0]);
    parent.append(mark);
    from = match.index + match[0].length;
  }
  if (from < text.length) parent.append(marks > MOST_MARKS ? visible(text.slice(from)) : text.slice(from));
  return parent;
}

/** One line for a list: no line breaks, bounded. */
function oneLine(text, most = 160) {
  return visible(String(text ?? "").slice(0, 4 * most).replace(/\s+/g, " ").trim().slice(0, most));
}

function asText(value) {
  if (typeof value === "string") return value;
  if (value === undefined) return "";
  const line = JSON.stringify(value);
  return line.length <= 80 ? line : JSON.stringify(value, null, 2);
}

/** A value for a list: without the braces and quotes of JSON. */
function gist(value) {
  if (typeof value === "string" || value === undefined) return value ?? "";
  return JSON.stringify(value, null, 1).replace(/\s+/g, " ").replace(/[{}"]/g, "").trim();
}

const WORDS = new Set(
  ("False None True and as assert async await break class continue def del elif else except finally for from global if " +
    "import in is lambda nonlocal not or pass raise return try while with yield match case").split(" "),
);
const OURS = new Set(
  ("context answer llm_query llm_batch llm_query_batched rlm_query rlm_batch rlm_query_batched FINAL FINAL_VAR SHOW_VARS " +
    "CallError history outputs").split(" "),
);
const PYTHON =
  /(#[^\n]*)|([rRbBfFuU]{0,2}(?:"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))|(\b\d[\w.]*)|([A-Za-z_]\w*)(\s*\()?/g;

/** Append Python with its words coloured. A rough tokenizer: wrong colours are possible, lost text is not. */
function writePython(parent, code) {
  const put = (kind, text) => {
    if (text) write(kind ? parent.appendChild(el("span", { class: kind })) : parent, text);
  };
  let from = 0;
  for (const match of code.matchAll(PYTHON)) {
    const [whole, comment, string, number, word, call] = match;
    put("", code.slice(from, match.index));
    if (comment) put("c", comment);
    else if (string) put("s", string);
    else if (number) put("n", number);
    else {
      put(WORDS.has(word) ? "k" : OURS.has(word) ? "o" : call ? "f" : "", word);
      put("", call);
    }
    from = match.index + whole.length;
  }
  put("", code.slice(from));
}

const FIRST = 20_000; // characters of a block shown at once
const MORE = 200_000;

/** A block of text that shows a long text piece by piece. */
function block(text, kind = "", python = false) {
  text = String(text ?? "");
  const pre = el("pre", { class: kind, tabindex: "-1" });
  const shown = text.slice(0, FIRST);
  if (python) writePython(pre, shown);
  else write(pre, shown);
  if (text.length <= FIRST) return pre;
  const box = el("div", { class: "long" }, pre);
  let at = FIRST;
  const button = el("button", { class: "more" });
  const label = () => (button.textContent = `Show more: ${count(text.length - at)} of ${count(text.length)} characters are hidden`);
  button.addEventListener("click", () => {
    write(pre, text.slice(at, at + MORE));
    at += MORE;
    if (at >= text.length) button.remove();
    else label();
  });
  label();
  box.append(button);
  return box;
}

const count = (n) => (n === null || n === undefined ? "–" : Number(n).toLocaleString("en-US"));

function short(n) {
  if (n === null || n === undefined) return "–";
  if (n < 1000) return String(n);
  if (n < 999_500) return (n / 1000).toFixed(n < 99_950 ? 1 : 0).replace(/\.0$/, "") + "k";
  return (n / 1e6).toFixed(n < 99.95e6 ? 1 : 0).replace(/\.0$/, "") + "M";
}

function dollars(cost) {
  if (cost === null || cost === undefined) return "";
  return "$" + (cost === 0 ? "0" : cost < 0.01 ? cost.toPrecision(2) : cost.toFixed(cost < 1 ? 3 : 2));
}

function seconds(s) {
  if (s === null || s === undefined || Number.isNaN(s)) return "";
  if (s < 0.0995) return Math.max(s * 1000, 0).toFixed(s < 0.00995 ? 1 : 0) + " ms";
  if (s < 59.95) return s.toFixed(s < 9.95 ? 2 : 1) + " s";
  const whole = Math.round(s);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const depthClass = (depth) => "d" + Math.min(Math.max(depth | 0, 0), 5);
