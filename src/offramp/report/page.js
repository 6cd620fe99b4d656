"use strict";
const failed = (what) => {
  const place = document.getElementById("error");
  place.hidden = false;
  place.textContent = `Something on this page does not work: ${what}. Token details may be missing; the pictures are not touched.`;
};
window.addEventListener("error", (event) => failed(event.message));
window.addEventListener("unhandledrejection", (event) => failed(String(event.reason)));

const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
let pinned = false;
let current = null;

const make = (name, text) => {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
};

// Where a token stands: what the trace says of it, and its text's grid.
const place = (token) => {
  const strip = token.parentElement;
  const text = token.closest(".text");
  const section = data.sections[token.closest(".run").dataset.section];
  const tokens = [...strip.querySelectorAll(".t")];
  const own = text.querySelector(".strip") === strip;
  const known = own && section.texts ? section.texts[text.dataset.text] : null;
  return { at: tokens.indexOf(token), tokens, section, known, grid: own ? text.querySelector(".wide svg") : null };
};

// The tooltip of a page without scripts becomes the panel's text.
const says = (token) => {
  if (token.title) {
    token.dataset.says = token.title;
    token.removeAttribute("title");
  }
  return token.dataset.says.split("\n");
};

const table = (token, where) => {
  const shown = panel.querySelector("table");
  shown.hidden = !where.known || !where.known.chosen;
  if (shown.hidden) return;
  const chosen = where.known.chosen[where.at];
  const last = chosen[chosen.length - 1];
  const rows = chosen.map((id, column) => {
    const row = document.createElement("tr");
    const depth = where.section.depths[column];
    row.classList.toggle("same", id === last);
    const here = parseInt(depth) === Number(token.dataset.d);
    row.classList.toggle("here", here);
    const sure = where.known.sure[where.at][column];
    row.append(make("td", depth + (here ? " ◀" : "")));
    row.append(make("td", where.section.vocabulary[id]), make("td", sure === undefined ? "" : `${sure}%`));
    return row;
  });
  shown.tBodies[0].replaceChildren(...rows.reverse());
};

const mark = (where) => {
  document.querySelectorAll("svg .mark").forEach((old) => old.remove());
  if (!where.grid) return;
  const { cell, row, left, top } = data.grid;
  const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const facts = { x: left + where.at * cell, y: top, width: cell, height: row * where.section.depths.length, class: "mark" };
  Object.entries(facts).forEach(([name, value]) => box.setAttribute(name, value));
  where.grid.append(box);
};

const show = (token) => {
  if (current) current.classList.remove("on");
  current = token;
  token.classList.add("on");
  const [word, ...lines] = says(token);
  panel.querySelector(".word").textContent = word;
  panel.querySelector(".lines").replaceChildren(...lines.map((line) => make("p", line)));
  const where = place(token);
  const box = token.getBoundingClientRect();
  panel.classList.toggle("left", box.left > innerWidth / 2); // never on top of what it is about
  table(token, where);
  mark(where);
  panel.hidden = false;
};

const hide = () => {
  panel.hidden = true;
  pinned = false;
  if (current) current.classList.remove("on");
  current = null;
  document.querySelectorAll("svg .mark").forEach((old) => old.remove());
};

// One Tab stop per strip; arrows walk over its tokens.
const focus = (token) => {
  if (!token) return;
  token.parentElement.querySelectorAll('[tabindex="0"]').forEach((old) => (old.tabIndex = -1));
  token.tabIndex = 0;
  token.focus();
};

const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 };

document.querySelectorAll(".strip").forEach((strip) => {
  const first = strip.querySelector(".t");
  if (first) first.tabIndex = 0;
  strip.addEventListener("mouseover", (event) => {
    if (!pinned && event.target.matches(".t")) show(event.target);
  });
  strip.addEventListener("focusin", (event) => show(event.target));
  strip.addEventListener("click", (event) => {
    if (!event.target.matches(".t")) return;
    focus(event.target);
    show(event.target);
    pinned = true;
  });
  strip.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    const { at, tokens } = place(event.target);
    focus(tokens[Math.max(0, Math.min(tokens.length - 1, at + steps[event.key]))]);
  });
});

document.querySelectorAll(".wide svg").forEach((grid) => {
  const tokens = [...grid.closest(".text").querySelector(".strip").querySelectorAll(".t")];
  grid.addEventListener("mousemove", (event) => {
    const { cell, left } = data.grid;
    const at = Math.floor((event.clientX - grid.getBoundingClientRect().left - left) / cell);
    if (!pinned && tokens[at] && tokens[at] !== current) show(tokens[at]);
  });
});

document.getElementById("close").addEventListener("click", hide);
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});
