"use strict";
// Line charts in SVG. A series is {name, x, y} or, where many points were put together, {name, x, y, low, high}.

const CHARTS = { smoothing: 0.9, log: false, all: [] };
const HEIGHT = 220, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24;

// A running mean that weighs the past by `weight`; corrected for its start, and by the distance between points.
function smoothed(series, weight) {
  if (!weight) return series.y;
  const span = series.x.length > 1 ? (series.x[series.x.length - 1] - series.x[0]) / (series.x.length - 1) : 1;
  let sum = 0, total = 0, before = series.x[0];
  return series.y.map((value, index) => {
    if (!Number.isFinite(value)) return NaN;
    const keep = weight ** Math.max(1, (series.x[index] - before) / (span || 1));
    before = series.x[index];
    sum = sum * keep + value;
    total = total * keep + 1;
    return sum / total;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * base >= rough) * base;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of [1, 2, 5]) {
      const at = digit * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  }
  return found.length > 6 ? found.filter((at) => /^1/.test(at.toExponential())) : found.length > 1 ? found : [low, high];
}

function extent(lists, positive) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) {
    for (const value of list) {
      if (!Number.isFinite(value) || (positive && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low > high ? [positive ? 0.1 : 0, 1] : [low, high];
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.shown = spec.series.map(() => true);
    this.at = el("span", { class: "at" });
    this.values = spec.series.map(() => el("b"));
    this.legend = el("div", { class: "legend" }, spec.series.map((series, index) => {
      const button = el("button", {
        type: "button", "aria-pressed": "true", title: spec.series.length > 1 ? "show or hide" : null,
        onclick: () => this.toggle(index, button),
      }, el("i", { class: series.colour }), series.name, this.values[index]);
      return button;
    }));
    this.plot = svg("svg", { height: HEIGHT, role: "img", "aria-label": this.words() });
    this.node = el("figure", { class: `card chart${spec.wide ? " wide" : ""}` },
      el("div", { class: "title" }, el("h3", {}, spec.title, spec.unit ? el("span", { class: "note" }, ` ${spec.unit}`) : ""), this.at),
      this.legend, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.rest());
    this.width = 0;
    this.visible = false;
    new IntersectionObserver((entries) => {
      this.visible = entries.some((entry) => entry.isIntersecting);
      this.fresh();
    }, { rootMargin: "300px" }).observe(this.node);
    setTimeout(() => this.fresh(true), 0); // once the page is up, for those who print it
    new ResizeObserver(() => {
      if (this.plot.clientWidth !== this.width) this.update();
    }).observe(this.plot);
    this.stale = true;
    CHARTS.all.push(this);
  }

  words() {
    const parts = this.spec.series.map((one) => `${one.name} ends at ${number(one.y[one.y.length - 1])}`);
    return `${this.spec.title} by step: ${parts.join(", ")}`;
  }

  toggle(index, button) {
    this.shown[index] = !this.shown[index];
    button.setAttribute("aria-pressed", String(this.shown[index]));
    this.update();
  }

  update() {
    this.stale = true;
    this.fresh();
  }

  fresh(hidden = false) {
    if (this.stale && (this.visible || hidden)) this.draw();
  }

  draw() {
    this.stale = false;
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    const { spec } = this, log = CHARTS.log && spec.log;
    const weight = spec.smooth ? CHARTS.smoothing : 0;
    this.lines = spec.series.map((series) => (series.points ? series.y : smoothed(series, weight)));
    const visible = spec.series.map((series, index) => ({ series, line: this.lines[index], index })).filter((one) => this.shown[one.index]);
    const all = visible.flatMap(({ series, line }) => [line, series.y, series.low || [], series.high || []]);
    let [low, high] = extent(all, log);
    const [first, last] = extent(visible.map(({ series }) => series.x), false);
    if (!log) {
      if (spec.zero) low = Math.min(0, low);
      else if (high - low < 1e-9 * Math.abs(high)) [low, high] = high > 0 ? [0, 2 * high] : [2 * low, 0];
      const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
      [low, high] = [spec.zero ? low : low - room, high + room];
    } else if (low === high) [low, high] = [low / 2, high * 2];
    const right = this.width - RIGHT, bottom = HEIGHT - BOTTOM;
    this.x = (value) => LEFT + ((value - first) / (last - first || 1)) * (right - LEFT);
    const place = (value) => log ? (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low)) : (value - low) / (high - low);
    this.y = (value) => bottom - place(value) * (bottom - TOP);
    this.fits = (value) => Number.isFinite(value) && (!log || value > 0);
    const parts = [];
    for (const at of log ? logTicks(low, high) : ticks(low, high, 4)) {
      const y = this.y(at).toFixed(1);
      parts.push(svg("line", { class: "gridline", x1: LEFT, x2: right, y1: y, y2: y }));
      parts.push(svg("text", { x: LEFT - 8, y: +y + 4, "text-anchor": "end" }, number(at)));
    }
    for (const at of ticks(first, last, Math.max(2, Math.floor(this.width / 110)))) {
      if (at !== Math.round(at)) continue;
      const x = this.x(at), anchor = right - x < 18 ? "end" : "middle";
      parts.push(svg("text", { x: (anchor === "end" ? right : x).toFixed(1), y: HEIGHT - 6, "text-anchor": anchor }, whole(at)));
    }
    parts.push(svg("line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom }));
    for (const { series, line } of visible) parts.push(...this.curve(series, line, weight && !series.points));
    this.cursor = svg("g");
    parts.push(this.cursor);
    this.plot.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.plot.replaceChildren(...parts);
    this.rest();
  }

  curve(series, line, faint) {
    const parts = [];
    if (series.low) parts.push(svg("path", { class: `band ${series.colour}`, d: this.area(series) }));
    else if (faint) parts.push(svg("path", { class: `raw ${series.colour}`, d: this.path(series.x, series.y) }));
    parts.push(svg("path", { class: `${faint ? "smooth" : "plain"} ${series.colour}`, d: this.path(series.x, line) }));
    if (series.x.length < 40) {
      series.x.forEach((x, index) => {
        if (this.fits(line[index])) parts.push(svg("circle", { class: `dot ${series.colour}`, r: 3, cx: this.x(x).toFixed(1), cy: this.y(line[index]).toFixed(1) }));
      });
    }
    return parts;
  }

  path(xs, ys) {
    let words = "", pen = "M";
    for (let index = 0; index < xs.length; index++) {
      if (!this.fits(ys[index])) { pen = "M"; continue; }
      words += `${pen}${this.x(xs[index]).toFixed(1)} ${this.y(ys[index]).toFixed(1)}`;
      pen = "L";
    }
    return words;
  }

  area(series) {
    const there = series.x.map((_, index) => index).filter((index) => this.fits(series.low[index]) && this.fits(series.high[index]));
    const corner = (index, list) => `${this.x(series.x[index]).toFixed(1)} ${this.y(list[index]).toFixed(1)}`;
    const over = there.map((index) => corner(index, series.high));
    const under = there.reverse().map((index) => corner(index, series.low));
    return over.length ? `M${[...over, ...under].join("L")}Z` : "";
  }

  point(event) {
    if (!this.x) return;
    const box = this.plot.getBoundingClientRect(), wanted = event.clientX - box.left;
    const nearest = this.spec.series.map((series, index) => (this.shown[index] ? this.nearest(series.x, wanted) : -1));
    const found = nearest.map((at, index) => (at < 0 ? null : this.spec.series[index].x[at])).filter((x) => x !== null);
    if (!found.length) return;
    const x = found.reduce((best, one) => (Math.abs(this.x(one) - wanted) < Math.abs(this.x(best) - wanted) ? one : best));
    const parts = [svg("line", { class: "cursor", x1: this.x(x), x2: this.x(x), y1: TOP, y2: HEIGHT - BOTTOM })];
    nearest.forEach((at, index) => {
      const series = this.spec.series[index], value = at < 0 ? NaN : this.lines[index][at];
      const here = this.fits(value) && (series.points || Math.abs(this.x(series.x[at]) - this.x(x)) < 12);
      this.values[index].textContent = here ? this.say(series, at, value) : "";
      if (here) parts.push(svg("circle", { class: `dot ${series.colour}`, r: 4, cx: this.x(series.x[at]), cy: this.y(value) }));
    });
    this.at.textContent = `step ${whole(x)}`;
    this.cursor.replaceChildren(...parts);
  }

  say(series, at, value) {
    const raw = series.y[at];
    return this.spec.smooth && CHARTS.smoothing && !series.points && raw !== value ? `${number(value)} (${number(raw)})` : number(value);
  }

  nearest(xs, wanted) {
    let low = 0, high = xs.length - 1;
    if (high < 0) return -1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.x(xs[middle]) < wanted) low = middle; else high = middle;
    }
    return Math.abs(this.x(xs[low]) - wanted) <= Math.abs(this.x(xs[high]) - wanted) ? low : high;
  }

  rest() {
    if (!this.lines) return;
    this.cursor.replaceChildren();
    this.at.textContent = "";
    this.lines.forEach((line, index) => { this.values[index].textContent = number(line[line.length - 1]); });
  }
}

function chartSection(id, title, specs, note) {
  const usable = specs.map((spec) => ({ ...spec, series: spec.series.filter((series) => series.x.length) })).filter((spec) => spec.series.length);
  if (!usable.length) return null;
  const redraw = () => CHARTS.all.forEach((chart) => chart.update());
  const shown = el("output", {}, String(CHARTS.smoothing));
  const tools = el("div", { class: "tools" },
    el("label", {}, "Smoothing", el("input", {
      type: "range", min: 0, max: 0.99, step: 0.01, value: CHARTS.smoothing,
      oninput: (event) => { CHARTS.smoothing = Number(event.target.value); shown.textContent = String(CHARTS.smoothing); redraw(); },
    }), shown),
    el("label", {}, el("input", { type: "checkbox", onchange: (event) => { CHARTS.log = event.target.checked; redraw(); } }), "Log scale"));
  const charts = usable.map((spec) => {
    spec.series = spec.series.map((series, index) => ({ colour: `k${index % 8}`, ...series }));
    return new Chart(spec).node;
  });
  return section(id, title, note, tools, el("div", { class: "charts" }, charts));
}

function bars(title, note, rows, say, advice) {
  const most = Math.max(...rows.map((row) => row.value));
  const total = rows.reduce((sum, row) => sum + row.value, 0);
  return el("div", { class: "card bars" }, el("h3", {}, title, note ? el("span", { class: "note" }, ` ${note}`) : ""),
    el("dl", {}, rows.map((row, index) => {
      const fill = el("i", { class: `k${row.colour ?? index % 8}` });
      fill.style.width = `${(row.value / (most || 1)) * 100}%`;
      return el("div", { class: "part" }, el("dt", {}, row.name), el("div", { class: "rail" }, fill), el("dd", {}, say(row.value, total)));
    })), advice ? el("p", { class: "advice" }, advice) : null);
}
