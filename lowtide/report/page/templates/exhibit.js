// Asks the server for one image of each model, and shows two of them with a line between.
"use strict";
const one = (query) => document.querySelector(query);
const all = (query) => [...document.querySelectorAll(query)];
const [form, stage, status, trouble] = ["form", ".stage", ".status", ".trouble"].map(one);
const choices = all(".choose");
let images = [];

const span = (seconds) => seconds < 1 ? `${(seconds * 1000).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;

function show() {
  choices.forEach((choice, side) => {
    const name = choice.selectedOptions[0].textContent;
    all(".side")[side].textContent = name;
    const drawn = images[choice.value];
    if (drawn) Object.assign(all(".stage img")[side], { src: drawn.image, alt: name });
  });
}

function fill(answer) {
  images = answer.images;
  const { width, height } = images[0];
  stage.style.aspectRatio = `${width}/${height}`;
  one(".compare").classList.toggle("tiny", Math.max(width, height) <= 128);
  all(".rows tbody tr").forEach((row, place) => {
    const drawn = images[place];
    row.querySelector(".all").textContent = span(drawn.seconds);
    row.querySelector(".call").textContent = span(drawn.seconds_per_call);
    row.querySelector(".psnr").textContent = drawn.psnr === null ? "–" : drawn.psnr.toFixed(2);
  });
  show();
}

async function draw() {
  const buttons = all("form button");
  const began = performance.now();
  const asked = {};
  for (const input of all("form input")) {
    if (input.value !== "") asked[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  buttons.forEach((button) => { button.disabled = true; });
  trouble.hidden = true;
  const clock = setInterval(() => {
    status.textContent = `drawing, ${Math.round((performance.now() - began) / 1000)} s`;
  }, 1000);
  try {
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch("/draw", { method: "POST", headers, body: JSON.stringify(asked) });
    const answer = await reply.json();
    if (!reply.ok) throw new Error(answer.error);
    fill(answer);
    status.textContent = `seed ${answer.seed}, ${answer.steps} steps`;
  } catch (error) {
    trouble.textContent = error.message;
    trouble.hidden = false;
    status.textContent = "";
  } finally {
    clearInterval(clock);
    buttons.forEach((button) => { button.disabled = false; });
  }
}

form.onsubmit = (event) => { event.preventDefault(); draw(); };
one(".next").onclick = () => {
  form.elements.seed.value = Number(form.elements.seed.value) + 1;
  draw();
};
choices.forEach((choice) => { choice.onchange = show; });
const slide = stage.querySelector("input");
slide.oninput = () => stage.style.setProperty("--at", `${slide.value}%`);
show();
draw();
