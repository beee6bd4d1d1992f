"use strict";
// Contact sheets of networks by strength.

function draw(content) {
  document.getElementById("page").append(
    el("header", { class: "head" }, el("div", { class: "over" }, "Contact sheet"), el("h1", {}, content.name), el("p", { class: "note" }, content.about)),
    ...mount([sheetSection(content.sheets)]),
    el("footer", {}, `Written by ${content.trainer}. This page holds all it shows and asks nothing of any network.`));
}

draw(CONTENT);
