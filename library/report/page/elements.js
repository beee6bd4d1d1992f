"use strict";
// Elements, numbers and words. Text only ever becomes a text node: what captions and prompts hold is never markup.

const CONTENT = JSON.parse(document.getElementById("content").textContent);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
}

function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function bytes(value) {
  if (!value) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** power;
  return `${power ? scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0) : scaled} ${units[power]}`;
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function moment(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–";
}

function plural(count, word) {
  return `${whole(count)} ${word}${count === 1 ? "" : word.endsWith("x") ? "es" : "s"}`;
}

function picture(source, alt) {
  return el("img", { src: source, alt, loading: "lazy", decoding: "async" });
}

// A relative address of a file beside the page.
function beside(path) {
  return path.split("/").map(encodeURIComponent).join("/");
}

function section(id, title, note, ...children) {
  const head = el("header", {}, el("h2", {}, title), note ? el("span", { class: "note" }, note) : null);
  return el("section", { id, "aria-label": title }, head, ...children);
}

function table(columns, rows) {
  const head = el("tr", {}, columns.map(([name, kind]) => el("th", { scope: "col", class: kind }, name)));
  return el("div", { class: "card scroll", tabindex: "0" },
    el("table", { class: "table" }, el("thead", {}, head), el("tbody", {}, rows)));
}

function facts(pairs) {
  return el("dl", { class: "rows card" },
    pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

function segments(label, names, chosen, choose) {
  const buttons = names.map((name) => el("button", {
    type: "button", "aria-pressed": String(name === chosen),
    onclick: () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.textContent === name));
      choose(name);
    },
  }, name));
  return el("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}

// Long text in three lines, in full once it is pressed.
function clamped(text) {
  const node = el("span", { class: "clamp", title: text }, text);
  node.addEventListener("click", () => node.classList.toggle("all"));
  return node;
}

function mount(sections) {
  const made = sections.filter(Boolean);
  const links = made.map((one) => el("a", { href: `#${one.id}` }, one.getAttribute("aria-label")));
  const bar = el("nav", { class: "bar", "aria-label": "Sections" }, el("ul", {}, links.map((link) => el("li", {}, link))));
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target) : seen.delete(entry.target);
    const first = made.findIndex((one) => seen.has(one));
    links.forEach((link, index) => link.classList.toggle("here", index === first));
    const link = links[first];
    if (link) bar.firstChild.scrollLeft = link.offsetLeft - 40;
  }, { rootMargin: "-60px 0px -55% 0px" });
  made.forEach((one) => watch.observe(one));
  return [bar, el("main", {}, made)];
}
