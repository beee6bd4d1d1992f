"use strict";
// Sample pictures: one step at a time, two steps on top of each other, or all of them; and the large view.

const LARGE = { dialog: null, shown: null };

function enlarge(list, index) {
  if (!LARGE.dialog) {
    LARGE.dialog = el("dialog", { "aria-label": "Picture" });
    LARGE.dialog.addEventListener("click", (event) => { if (event.target === LARGE.dialog) LARGE.dialog.close(); });
    LARGE.dialog.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) { event.preventDefault(); turn(by); }
    });
    document.body.append(LARGE.dialog);
  }
  LARGE.shown = { list, index };
  turn(0);
  if (!LARGE.dialog.open) LARGE.dialog.showModal();
}

function turn(by) {
  const { list } = LARGE.shown;
  LARGE.shown.index = Math.min(list.length - 1, Math.max(0, LARGE.shown.index + by));
  const one = list[LARGE.shown.index], at = LARGE.shown.index;
  const step = (text, label, to, off) => el("button", { class: "button", type: "button", "aria-label": label, disabled: off, onclick: () => turn(to) }, text);
  LARGE.dialog.replaceChildren(
    el("img", { src: one.src, alt: one.text }),
    el("div", { class: "row" },
      el("strong", {}, one.label), el("span", { class: "note" }, `${at + 1} of ${list.length}`),
      one.file ? el("a", { class: "button", href: beside(one.file), target: "_blank", rel: "noopener" }, "Full size") : null,
      el("span", { class: "push" }), step("←", "before", -1, at === 0), step("→", "after", 1, at === list.length - 1),
      el("button", { class: "button", type: "button", autofocus: true, onclick: () => LARGE.dialog.close() }, "Close"),
      el("p", { class: "grow note" }, one.text)));
}

function samplesSection(samples) {
  if (!samples || !samples.pictures.length) return null;
  const { prompts, steps } = samples;
  const at = new Map(samples.pictures.map((one) => [`${one.prompt} ${one.step}`, one]));
  const find = (prompt, step) => at.get(`${prompt.index} ${step}`);
  const listOf = (prompt) => steps.map((step) => find(prompt, step)).filter(Boolean)
    .map((one) => ({ src: one.src, file: one.file, step: one.step, text: prompt.text, label: `step ${whole(one.step)}` }));
  const open = (prompt, one) => {
    const list = listOf(prompt);
    enlarge(list, list.findIndex((item) => item.step === one.step));
  };
  let mode = "One step", chosen = steps.length - 1, playing = null;
  const said = el("output", { "aria-live": "polite" });
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: chosen, "aria-label": "Step", oninput: () => { chosen = Number(slider.value); show(); } });
  const play = el("button", { class: "button", type: "button", "aria-label": "Play through the steps", onclick: () => (playing ? stop() : start()) }, "▶");
  const area = el("div");
  const bar = el("div", { class: "steps" }, play, slider, said);

  function start() {
    if (chosen === steps.length - 1) chosen = -1;
    play.textContent = "❚❚";
    playing = setInterval(() => {
      if (chosen >= steps.length - 1) { stop(); return; }
      chosen += 1;
      slider.value = chosen;
      show();
    }, 450);
  }
  function stop() { clearInterval(playing); playing = null; play.textContent = "▶"; }

  const cards = prompts.map((prompt) => {
    const first = listOf(prompt)[0] && find(prompt, listOf(prompt)[0].step);
    const frame = el("div", { class: "frame" });
    frame.style.aspectRatio = first ? `${first.width} / ${first.height}` : "1";
    return { prompt, frame, first, split: 50, node: el("figure", { class: "card sample" }, frame, caption(prompt)) };
  });

  function plain(card, one) {
    card.frame.className = "frame open";
    card.frame.onclick = () => one && open(card.prompt, one);
    const old = card.frame.querySelector("img");
    if (!one) { card.frame.replaceChildren(el("div", { class: "none" }, "no picture at this step")); return; }
    const image = picture(one.src, `${card.prompt.text}, step ${one.step}`);
    image.loading = "eager";
    image.decoding = "sync";
    if (old && old.src === one.src) return;
    card.frame.replaceChildren(image);
  }

  function versus(card, one) {
    card.frame.className = "frame";
    card.frame.onclick = null;
    if (!one || !card.first) { card.frame.replaceChildren(el("div", { class: "none" }, "no picture at this step")); return; }
    const over = picture(card.first.src, `${card.prompt.text}, step ${card.first.step}`);
    const divider = el("div", { class: "divider" });
    const split = el("input", { class: "split", type: "range", min: 0, max: 100, value: card.split, "aria-label": `before and after: ${card.prompt.text}` });
    const place = () => {
      card.split = Number(split.value);
      over.style.clipPath = `inset(0 ${100 - card.split}% 0 0)`;
      divider.style.left = `calc(${card.split}% - 1px)`;
    };
    split.addEventListener("input", place);
    place();
    card.frame.replaceChildren(picture(one.src, `${card.prompt.text}, step ${one.step}`), over,
      el("span", { class: "corner left" }, `step ${whole(card.first.step)}`), el("span", { class: "corner right" }, `step ${whole(one.step)}`), divider, split);
  }

  function all() {
    const head = el("tr", {}, el("th", { scope: "col" }, "Prompt"), steps.map((step) => el("th", { scope: "col" }, whole(step))));
    const rows = prompts.map((prompt) => el("tr", {}, el("th", { scope: "row" }, clamped(prompt.text)), steps.map((step) => {
      const one = find(prompt, step);
      if (!one) return el("td");
      const image = picture(one.src, `step ${step}`);
      image.width = one.width;
      image.height = one.height;
      return el("td", {}, el("button", { type: "button", "aria-label": `${prompt.text}, step ${step}`, onclick: () => open(prompt, one) }, image));
    })));
    const box = el("div", { class: "card scroll", tabindex: "0" }, el("table", { class: "grid" }, el("thead", {}, head), el("tbody", {}, rows)));
    area.replaceChildren(box);
    box.scrollLeft = box.scrollWidth;
  }

  function show() {
    const step = steps[chosen];
    said.textContent = `step ${whole(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    for (const card of cards) (mode === "Before / after" ? versus : plain)(card, find(card.prompt, step));
  }

  function choose(name) {
    stop();
    mode = name;
    bar.hidden = name === "All";
    bar.style.display = bar.hidden ? "none" : "";
    if (name === "All") { all(); return; }
    area.replaceChildren(el("div", { class: name === "One step" ? "gallery" : "gallery versus" }, cards.map((card) => card.node)));
    cards.forEach((card) => card.frame.replaceChildren());
    show();
  }

  const names = steps.length > 1 ? ["One step", "Before / after", "All"] : ["One step", "All"];
  const note = `${plural(prompts.length, "prompt")} at ${plural(steps.length, "step")}`
    + (samples.left_out ? `; ${plural(samples.left_out, "picture")} more in the folder sample` : "");
  const made = section("samples", "Samples", note, el("div", { class: "tools" }, segments("View", names, mode, choose)), bar, area);
  choose(mode);
  return made;
}

function caption(prompt) {
  return el("figcaption", {}, clamped(prompt.text), prompt.details ? el("span", { class: "small" }, prompt.details) : null);
}

// A contact sheet: rows by strength, columns by file, one table for each prompt.
function sheetSection(sheets, id = "sheets", title = "Strength and checkpoint") {
  if (!sheets || !sheets.length) return null;
  const boxes = sheets.map((sheet) => {
    const flat = sheet.cells.flat().filter(Boolean);
    const list = sheet.cells.flatMap((row, y) => row.map((cell, x) => cell && { ...cell, label: `${sheet.columns[x]}, ${sheet.row_name} ${sheet.rows[y]}`, text: sheet.title })).filter(Boolean);
    const head = el("tr", {}, el("th", { scope: "col" }, sheet.row_name), sheet.columns.map((name) => el("th", { scope: "col" }, name)));
    const rows = sheet.rows.map((name, y) => el("tr", {}, el("th", { scope: "row" }, name), sheet.columns.map((_, x) => {
      const cell = sheet.cells[y][x];
      if (!cell) return el("td");
      const image = picture(cell.src, `${sheet.columns[x]}, ${sheet.row_name} ${name}`);
      image.width = cell.width;
      image.height = cell.height;
      return el("td", {}, el("button", { type: "button", "aria-label": image.alt, onclick: () => enlarge(list, flat.indexOf(cell)) }, image));
    })));
    return el("figure", { class: "card sample" }, el("figcaption", {}, clamped(sheet.title), sheet.details ? el("span", { class: "small" }, sheet.details) : null),
      el("div", { class: "scroll", tabindex: "0" }, el("table", { class: "grid narrow" }, el("thead", {}, head), el("tbody", {}, rows))));
  });
  return section(id, title, null, el("div", { class: "buckets" }, boxes));
}
