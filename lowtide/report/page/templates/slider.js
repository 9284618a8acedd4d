// The images side by side: the slider, the choice of two models, and the choice of a seed.
"use strict";
const box = document.querySelector(".compare");

function compare() {
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  const rows = all(".contact tbody tr").map((row) => all("td", row));
  const names = all(".contact tbody th").map((head) => head.textContent);
  const captions = all(".contact thead th").map((head) => head.textContent);
  const [stage, caption, which] = all(".stage, .caption, .which", box);
  const choices = all(".choose", box);
  let seed = 0;

  function show() {
    all("td.on").forEach((cell) => cell.classList.remove("on"));
    which.textContent = `${seed + 1} of ${captions.length}`;
    caption.textContent = captions[seed];
    choices.forEach((choice, side) => {
      const cell = rows[choice.value][seed];
      const { src, alt } = cell.querySelector("img");
      cell.classList.add("on");
      Object.assign(all("img", stage)[side], { src, alt });
      all(".side", stage)[side].textContent = names[choice.value];
      const scores = document.createElement("small");
      scores.textContent = cell.dataset.scores && `${names[choice.value]}: ${cell.dataset.scores}`;
      caption.append(scores);
    });
  }

  const slide = stage.querySelector("input");
  slide.oninput = () => stage.style.setProperty("--at", `${slide.value}%`);
  choices.forEach((choice) => { choice.onchange = show; });
  all("[data-move]", box).forEach((button) => { button.onclick = () => {
    seed = (seed + Number(button.dataset.move) + captions.length) % captions.length;
    show();
  }; });
  rows.forEach((row, model) => row.forEach((cell, place) => { cell.onclick = () => {
    seed = place;
    if (model !== Number(choices[0].value)) choices[1].value = model;
    show();
    box.scrollIntoView({ block: "nearest" });
  }; }));
  box.hidden = false;
  show();
}

if (box) compare();
