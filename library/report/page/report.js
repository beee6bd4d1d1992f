"use strict";
// The report of one run.

function headOf(content) {
  const { run } = content;
  const tile = (name, value, unit, sub) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value, unit ? el("small", {}, ` ${unit}`) : null), el("div", { class: "sub" }, sub || " "));
  const left = run.status === "running" && run.seconds_per_step ? (run.total_steps - run.step) * run.seconds_per_step : NaN;
  const tiles = [
    tile("Step", whole(run.step), `of ${whole(run.total_steps)}`, `epoch ${whole(run.epoch)} of ${whole(run.num_epochs)}`),
    tile("Loss, mean of an epoch", number(run.average_loss), "", run.first_average ? `${number(run.first_average)} after the first` : ""),
    run.best ? tile("Best validation loss", number(run.best.loss), "", `at step ${whole(run.best.step)}`) : null,
    run.seconds_per_step ? tile("Speed", number(run.seconds_per_step), "s a step", `${number(run.images_per_second)} images a second`) : null,
    tile(run.status === "running" ? "Time left" : "Time", duration(run.status === "running" ? left : run.seconds), "", run.status === "running" ? `${duration(run.seconds)} so far` : "without pauses"),
    run.peak_memory ? tile("Peak memory", bytes(run.peak_memory), "", run.device) : null,
  ];
  return el("header", { class: "head" },
    el("div", { class: "over" }, "Training report"),
    el("h1", {}, run.name),
    el("div", { class: "line" }, el("span", { class: `pill ${run.status}` }, run.status),
      el("span", {}, `started ${moment(run.started_at)}`), el("span", {}, `as of ${moment(run.updated_at)}`),
      run.device ? el("span", {}, `${run.num_ranks} × ${run.device}`) : null),
    run.message ? el("p", { class: "note" }, run.message) : null,
    el("progress", { max: run.total_steps || 1, value: run.step, "aria-label": "steps done" }),
    el("dl", { class: "tiles" }, tiles));
}

function noticesSection(notices) {
  if (!notices.length) return null;
  const items = notices.map((one) => el("li", { class: one.level === "ERROR" || one.level === "CRITICAL" ? "error" : null },
    one.step === null ? null : el("span", { class: "when" }, `step ${whole(one.step)}`),
    one.code ? el("span", { class: "tag warn" }, one.code) : null, one.text));
  return section("notices", "Warnings and advice", String(notices.length), el("ul", { class: "notices" }, items));
}

function resourcesSection(content) {
  const boxes = [];
  const share = (value, total) => `${((100 * value) / (total || 1)).toFixed(1)} %`;
  if (content.time.length) boxes.push(bars("Where the time went", `${duration(content.run.seconds)} on the first rank`, content.time, (value, total) => `${duration(value)} · ${share(value, total)}`, content.time_advice));
  if (content.memory.length) boxes.push(bars("GPU memory at its peak", "first GPU", content.memory, (value, total) => `${bytes(value)} · ${share(value, total)}`));
  return boxes.length ? section("resources", "Time and memory", null, el("div", { class: "charts" }, boxes)) : null;
}

function dataSection(data) {
  if (!data) return null;
  const folders = data.folders.length ? table(
    [["Folder"], ["Kind"], ["Images", "n"], ["Repeats", "n"], ["Validation", "n"], ["Captions", "n"], ["Empty", "n"], ["First caption"]],
    data.folders.map((one) => el("tr", {}, el("td", { class: "name" }, one.name), el("td", {}, one.kind), el("td", { class: "n" }, whole(one.images)), el("td", { class: "n" }, whole(one.repeats)),
      el("td", { class: "n" }, whole(one.validation)), el("td", { class: "n" }, whole(one.captions)), el("td", { class: "n" }, whole(one.empty)), el("td", { class: "text" }, clamped(one.example))))) : null;
  const buckets = data.buckets.map((one) => {
    const batches = plural(one.batches, "batch").replace("batchs", "batches"), full = one.samples === one.batches * one.last_batch;
    const told = [plural(one.images, "image"), plural(one.samples, "sample"), one.last_batch ? `${batches}${full ? "" : ", the last"} of ${one.last_batch}` : batches,
      one.cropped > 0.005 ? `up to ${(100 * one.cropped).toFixed(0)} % cut off` : null];
    return el("div", { class: "card bucket" },
      el("header", {}, el("h3", {}, `${one.size[0]} × ${one.size[1]}`), el("span", { class: "note" }, told.filter(Boolean).join(" · ")),
        one.enlarged ? el("span", { class: "tag warn" }, `${one.enlarged} enlarged`) : null),
      one.pictures.length ? el("div", { class: "strip", tabindex: "0" }, one.pictures.map((shown, index) => thumb(shown, one.pictures, index))) : null);
  });
  return section("data", "Data", null, facts(data.plan), folders, el("div", { class: "buckets" }, buckets.length ? el("h3", { class: "hidden" }, "Buckets") : null, buckets));
}

function thumb(shown, all, index) {
  const image = picture(shown.src, shown.caption || shown.name);
  image.width = shown.width;
  image.height = shown.height;
  const text = clamped(shown.caption || "(no caption)");
  const node = el("figure", { class: "thumb" }, image, el("figcaption", {}, text));
  node.style.width = `${Math.max(96, Math.round((148 * shown.width) / shown.height))}px`;
  image.style.cursor = "zoom-in";
  image.addEventListener("click", () => enlarge(all.map((one) => ({ src: one.src, label: one.name, text: one.caption })), index));
  return node;
}

function outliersSection(outliers) {
  if (!outliers || !outliers.images.length) return null;
  const rows = outliers.images.map((one) => el("tr", {},
    el("td", {}, el("div", { class: "outlier" }, one.src ? picture(one.src, "") : null, el("span", { class: "code" }, one.image))),
    el("td", { class: "n" }, number(one.score)), el("td", { class: "n" }, number(one.loss)), el("td", { class: "n" }, whole(one.visits)), el("td", { class: "text" }, one.caption ? clamped(one.caption) : "")));
  return section("outliers", "Images that stand out", `at the end of epoch ${outliers.epoch}: their loss is far from that of the others at the same noise`,
    table([["Image"], ["Score", "n"], ["Loss / expected", "n"], ["Visits", "n"], ["Caption"]], rows));
}

function checkpointsSection(checkpoints) {
  if (!checkpoints.length) return null;
  const rows = checkpoints.map((one) => {
    const hash = one.sha256 ? el("button", {
      class: "copy", type: "button", title: `${one.sha256}; press to copy`,
      onclick: (event) => { navigator.clipboard?.writeText(one.sha256); event.currentTarget.textContent = one.sha256; },
    }, `${one.sha256.slice(0, 12)}…`) : "–";
    return el("tr", { class: one.exists ? null : "gone" },
      el("td", { class: "name" }, one.exists ? el("a", { href: beside(one.file) }, one.file) : one.file),
      el("td", {}, one.marks.map((mark) => el("span", { class: `tag${mark.startsWith("best") ? " good" : ""}` }, mark)), one.exists ? null : el("span", { class: "tag" }, "removed")),
      el("td", { class: "n" }, whole(one.step)), el("td", { class: "n" }, one.validation === null ? "–" : number(one.validation)), el("td", { class: "n" }, bytes(one.bytes)), el("td", { class: "hash" }, hash));
  });
  return section("checkpoints", "Checkpoints", null,
    table([["File"], ["Kind"], ["Step", "n"], ["Validation loss", "n"], ["Size", "n"], ["SHA-256"]], rows));
}

function optionsSection(options) {
  if (!options.length) return null;
  const body = el("tbody");
  let words = "", given = true;
  function show() {
    const rows = [];
    let group = null;
    for (const one of options) {
      if (given && one.source === "default") continue;
      if (words && !`${one.name} ${one.value} ${one.source} ${one.effect}`.toLowerCase().includes(words)) continue;
      if (one.section !== group) { group = one.section; rows.push(el("tr", { class: "group" }, el("th", { colspan: 4, scope: "rowgroup" }, group))); }
      rows.push(el("tr", {}, el("td", { class: "name" }, one.name), el("td", { class: `value${one.state === "used" ? "" : " idle"}` }, one.value), el("td", { class: "source" }, one.source), el("td", { class: "note" }, one.effect)));
    }
    body.replaceChildren(...(rows.length ? rows : [el("tr", {}, el("td", { colspan: 4, class: "note" }, "no option of that kind"))]));
  }
  const count = options.filter((one) => one.source !== "default").length;
  const tools = el("div", { class: "tools" },
    el("input", { type: "search", placeholder: "Filter options", "aria-label": "Filter options", oninput: (event) => { words = event.target.value.trim().toLowerCase(); show(); } }),
    segments("Which options", [`Given (${count})`, `All (${options.length})`], `Given (${count})`, (name) => { given = name.startsWith("Given"); show(); }));
  show();
  const head = el("tr", {}, ["Option", "Value", "From", "Effect"].map((name) => el("th", { scope: "col" }, name)));
  return section("options", "Options", "each with the place its value comes from", tools,
    el("div", { class: "card scroll", tabindex: "0" }, el("table", { class: "table options" }, el("thead", {}, head), body)));
}

function draw(content) {
  document.getElementById("page").append(headOf(content), ...mount([
    noticesSection(content.notices),
    samplesSection(content.samples),
    chartSection("curves", "Curves", content.charts),
    sheetSection(content.sheets),
    resourcesSection(content),
    checkpointsSection(content.checkpoints),
    outliersSection(content.outliers),
    dataSection(content.data),
    optionsSection(content.options),
  ]), el("footer", {}, `Written by ${content.trainer}. This page holds all it shows and asks nothing of any network.`));
}

draw(CONTENT);
