"use strict";
// Several runs next to each other: what differs, curves over each other, samples side by side.

// What tells runs apart without changing what they learn.
const NAMES = new Set(["output_dir", "output_name", "config_file", "logging_dir", "log_prefix", "log_tracker_name", "wandb_run_name", "wandb_api_key", "huggingface_token", "console_log_file"]);

function runMark(index) {
  return el("i", { class: `mark k${index % 8}` });
}

function runsSection(runs) {
  const rows = runs.map(({ name, run }, index) => el("tr", {},
    el("td", { class: "name" }, runMark(index), name), el("td", {}, el("span", { class: `pill ${run.status}` }, run.status)),
    el("td", { class: "n" }, `${whole(run.step)} / ${whole(run.total_steps)}`), el("td", { class: "n" }, number(run.average_loss)),
    el("td", { class: "n" }, run.best ? `${number(run.best.loss)} at ${whole(run.best.step)}` : "–"),
    el("td", { class: "n" }, number(run.seconds_per_step)), el("td", { class: "n" }, number(run.images_per_second)),
    el("td", { class: "n" }, duration(run.seconds)), el("td", { class: "n" }, bytes(run.peak_memory)), el("td", { class: "whole" }, run.device ? `${run.num_ranks} × ${run.device}` : "–")));
  return section("runs", "Runs", null, table([["Run"], ["State"], ["Steps", "n"], ["Mean loss", "n"], ["Best validation", "n"], ["s / step", "n"], ["Images / s", "n"], ["Time", "n"], ["Peak memory", "n"], ["On"]], rows));
}

function differences(runs) {
  const names = [...new Set(runs.flatMap((one) => one.options.map((option) => option.name)))];
  const by = runs.map((one) => new Map(one.options.map((option) => [option.name, option])));
  const rows = names.map((name) => {
    const found = by.map((options) => options.get(name));
    const values = found.map((option) => (option ? option.value : "-"));
    return { name, found, values, differs: new Set(values).size > 1 && !NAMES.has(name), given: found.some((option) => option && option.source !== "default") };
  });
  const body = el("tbody");
  const show = (keep) => {
    const kept = rows.filter(keep);
    body.replaceChildren(...(kept.length ? kept.map((row) => el("tr", { class: row.differs ? "differs" : null }, el("td", { class: "name" }, row.name),
      row.values.map((value, index) => el("td", { class: "value", title: row.found[index]?.source }, value)))) : [el("tr", {}, el("td", { class: "note", colspan: runs.length + 1 }, "the runs have the same options"))]));
  };
  const kinds = { [`Different (${rows.filter((row) => row.differs).length})`]: (row) => row.differs, "Given": (row) => row.given, "All": () => true };
  const first = Object.keys(kinds)[0];
  show(kinds[first]);
  const head = el("tr", {}, el("th", { scope: "col" }, "Option"), runs.map(({ name }, index) => el("th", { scope: "col" }, runMark(index), name)));
  return section("options", "Options", null, el("div", { class: "tools" }, segments("Which options", Object.keys(kinds), first, (name) => show(kinds[name]))),
    el("div", { class: "card scroll", tabindex: "0" }, el("table", { class: "table" }, el("thead", {}, head), body)));
}

function overlaid(runs) {
  const titles = [...new Set(runs.flatMap((one) => one.charts.map((spec) => spec.title)))];
  return titles.flatMap((title) => {
    const specs = runs.map((one) => one.charts.find((spec) => spec.title === title));
    const inner = [...new Set(specs.flatMap((spec) => (spec ? spec.series.map((series) => series.name) : [])))];
    return inner.map((name) => ({
      ...specs.find(Boolean), title: inner.length > 1 ? `${title}: ${name}` : title, unit: inner.length > 1 ? "" : specs.find(Boolean).unit, wide: title === "Loss" && name === "training",
      series: specs.flatMap((spec, index) => (spec ? spec.series : []).filter((series) => series.name === name)
        .map((series) => ({ ...series, low: undefined, high: undefined, name: runs[index].name, colour: `k${index % 8}` }))),
    }));
  });
}

function sideBySide(runs) {
  const drawn = runs.map((one, index) => ({ ...one, index })).filter((one) => one.samples && one.samples.pictures.length);
  if (!drawn.length) return null;
  const steps = [...new Set(drawn.flatMap((one) => one.samples.steps))].sort((a, b) => a - b);
  const texts = [...new Set(drawn.flatMap((one) => one.samples.prompts.map((prompt) => prompt.text)))];
  const pictures = drawn.map((one) => {
    const byPrompt = new Map();
    for (const text of texts) {
      const prompt = one.samples.prompts.find((item) => item.text === text);
      byPrompt.set(text, prompt ? one.samples.pictures.filter((item) => item.prompt === prompt.index).sort((a, b) => a.step - b.step) : []);
    }
    return byPrompt;
  });
  let chosen = steps.length - 1;
  const said = el("output", { "aria-live": "polite" });
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: chosen, "aria-label": "Step", oninput: () => { chosen = Number(slider.value); show(); } });
  const area = el("div", { class: "buckets" });
  function show() {
    const wanted = steps[chosen];
    said.textContent = `step ${whole(wanted)}`;
    area.replaceChildren(...texts.map((text) => {
      const found = drawn.map((_, index) => pictures[index].get(text).filter((item) => item.step <= wanted).pop());
      const list = found.map((item, index) => item && { src: item.src, label: `${drawn[index].name}, step ${whole(item.step)}`, text }).filter(Boolean);
      const cells = drawn.map((one, index) => {
        const item = found[index];
        const label = el("span", { class: "note" }, runMark(one.index), one.name, item && item.step !== wanted ? ` at ${whole(item.step)}` : "");
        if (!item) return el("div", { class: "side" }, el("div", { class: "frame blank" }, el("div", { class: "none" }, "no picture")), label);
        const image = picture(item.src, `${one.name}: ${text}, step ${item.step}`);
        const frame = el("div", { class: "frame open", onclick: () => enlarge(list, list.findIndex((entry) => entry.src === item.src)) }, image);
        frame.style.aspectRatio = `${item.width} / ${item.height}`;
        return el("div", { class: "side" }, frame, label);
      });
      return el("figure", { class: "card sample" }, el("figcaption", {}, clamped(text)), el("div", { class: "strip sides", tabindex: "0" }, cells));
    }));
  }
  show();
  return section("samples", "Samples", "each run's last picture up to the step", el("div", { class: "steps" }, slider, said), area);
}

function draw(content) {
  const { runs } = content;
  document.getElementById("page").append(
    el("header", { class: "head" }, el("div", { class: "over" }, "Comparison"), el("h1", {}, runs.map((one) => one.name).join(" · "))),
    ...mount([runsSection(runs), differences(runs), chartSection("curves", "Curves", overlaid(runs)), sideBySide(runs)]),
    el("footer", {}, `Written by ${content.trainer}. This page holds all it shows and asks nothing of any network.`));
}

draw(CONTENT);
