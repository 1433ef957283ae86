// The page of `beholder watch`: asks /state and /golden every few seconds and shows what they say. Every text is set as
// text, never as HTML; nothing else is asked.
"use strict";

const EVERY_MS = 2000, SLOWEST_MS = 30000, ENDED_MS = 10000;
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let key = sessionStorage.getItem("beholder-watch-key") || "";
const tags = {}, last = {};
let wait = EVERY_MS, timer = null, album = null, said = "";

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) if (v !== false && v !== null) made.setAttribute(k, v === true ? "" : v);
  made.append(...children);
  return made;
}

function draw(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  if (text !== undefined) made.textContent = text;
  return made;
}

const num = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(1).replace(".0e", "e").replace("e+", "e") : String(+v.toPrecision(4)));

// ------------------------------------------------------------------------------------------------------- asking

class Locked extends Error {}

async function ask(path) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (tags[path]) headers["If-None-Match"] = tags[path];
  const answer = await fetch(path, { headers, cache: "no-store", credentials: "omit", redirect: "error" });
  if (answer.status === 401) throw new Locked();
  if (answer.status === 304) return null;
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const told = await answer.json();
  tags[path] = answer.headers.get("ETag");
  return told;
}

async function tick() {
  clearTimeout(timer);
  try {
    const state = await ask("state");
    if (state) { last.state = state; show(state); }
    const golden = await ask("golden");
    if (golden) { album = golden; showGolden(); }
    $("ask").hidden = true;
    wait = last.state && last.state.ended ? ENDED_MS : EVERY_MS;
    $("live").textContent = last.state && last.state.ended ? "" : "live";
  } catch (error) {
    if (error instanceof Locked) return unlock();
    wait = Math.min(SLOWEST_MS, wait * 2);
    $("live").textContent = `no answer; again in ${Math.round(wait / 1000)} s`;
  }
  if (!document.hidden) timer = setTimeout(tick, wait);
}

function unlock() {
  $("wrong").textContent = key ? "This is not its key." : "";
  key = "";
  $("ask").hidden = false;
  $("status").textContent = "locked";
  $("run").textContent = "Beholder watch";
  $("key").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  if (!/^[\x21-\x7e]*$/.test(key)) { $("wrong").textContent = "A key has ASCII characters and no blanks."; return; }
  sessionStorage.setItem("beholder-watch-key", key);
  $("key").value = "";
  tick();
});
let resized = null;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => { if (last.state && last.state.there) $("plots").replaceChildren(...last.state.plots.map(plot)); }, 200);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });

// ------------------------------------------------------------------------------------------------------- showing

function show(s) {
  document.title = `${s.run} · ${s.told ? s.told.split(":")[0].slice(0, 40) : ""} · Beholder`;
  $("run").textContent = s.run;
  $("all").hidden = !s.there;
  $("none").hidden = s.there;
  $("stage").textContent = s.stage ? `stage ${s.stage}` : "";
  $("status").className = `pill ${s.there ? (s.told.startsWith("ended without") ? "lost" : s.status) : ""}`;
  $("status").textContent = s.there ? s.told : "waiting";
  if (!s.there) { $("none").textContent = s.told; say(s.told); return; }
  const { step, total, eta } = s.progress;
  $("progress").max = total || 1;
  $("progress").value = total ? Math.min(step, total) : 0;
  $("steps").textContent = [total ? `step ${step.toLocaleString("en")} of ${total.toLocaleString("en")}` : `step ${step.toLocaleString("en")}`, total ? `${Math.floor(100 * Math.min(1, step / total))} %` : "", eta].filter(Boolean).join(" · ");
  same("warnings", s.warnings, () => $("warnings").replaceChildren(...s.warnings.map((w) => el("li", {}, w))));
  same("facts", s.facts, () => $("facts").replaceChildren(...s.facts.map(fact)));
  same("verdicts", [s.verdicts, s.measured], () => showVerdicts(s.verdicts, s.measured));
  same("plots", s.plots, () => $("plots").replaceChildren(...s.plots.map(plot)));
  same("gates", [s.gates, s.ended], () => showGates(s.gates, s.ended));
  same("guards", s.guardrails, () => showGuards(s.guardrails));
  say(`${s.told}${total && !s.ended ? `, ${Math.floor(10 * step / total) * 10} per cent` : ""}`);
}

// Redrawn only where it changed, so that focus and open details stay.
function same(name, value, redraw) {
  const now = JSON.stringify(value);
  if (last[name] !== now) { last[name] = now; redraw(); }
}

function say(text) {
  if (text !== said) { said = text; $("said").textContent = text; }
}

const fact = ([label, value, more]) => el("div", {}, el("dt", {}, label, ...(more ? [el("small", {}, more)] : [])), el("dd", {}, value));

function showVerdicts(rows, measured) {
  $("verdicts").hidden = !rows.length && !measured.length;
  $("h-verdicts").textContent = rows.length ? "What the evidence says" : "Measured so far";
  $("numbers").replaceChildren(...measured.map(fact));
  $("verdicts").querySelector(".cards").replaceChildren(...rows.map((v) => el("div", { class: `card verdict ${v.tone}` }, el("h3", {}, v.question), el("b", {}, v.answer), el("p", {}, v.why))));
}

const MARKS = { passed: "✓ passed", failed: "✗ failed", unknown: "? not judged", waits: "… not yet" };

function showGates(rows, ended) {
  $("h-gates").textContent = ended ? "Gates" : "Gates so far";
  const n = (state) => rows.filter((r) => r.state === state).length;
  $("gates-told").textContent = !rows.length ? "No gate is declared." : ended
    ? `${n("passed")} of ${rows.length} passed, ${n("failed")} failed, ${n("unknown")} could not be judged.`
    : `${n("passed")} met by the last evaluation, ${n("failed")} not; ${n("waits")} are judged at the end, when everything is measured with its interval.`;
  const row = (r) => el("li", { class: r.state, title: r.why || false }, el("b", {}, MARKS[r.state]), r.name, el("small", {}, [`${r.what}: ${r.number}`, `must be ${r.bound}`, r.interval, r.where && `in ${r.where}`, r.state === "failed" && r.why].filter(Boolean).join(" · ")));
  const waits = rows.filter((r) => r.state === "waits");
  $("gates").querySelector("ul").replaceChildren(...rows.filter((r) => r.state !== "waits").map(row));
  $("waiting").hidden = !waits.length;
  $("waiting").querySelector("summary").textContent = `${waits.length} that wait`;
  $("waiting").querySelector("ul").replaceChildren(...waits.map(row));
}

function showGuards(g) {
  $("guards").hidden = !g.rules.length;
  $("guards-told").textContent = g.broken ? `Passed: ${g.broken}.` : g.read === null ? "Nothing has been read yet." : `None is passed; last read after step ${g.read}.`;
  $("guards").querySelector("ul").replaceChildren(...g.rules.map((r) => el("li", {}, el("b", {}, r.name), [r.what, r.number].filter(Boolean).join(": "), el("small", {}, r.why || ""))));
}

// ------------------------------------------------------------------------------------------------------- curves

function plot(p) {
  const large = p.size === "large", W = large ? Math.max(360, Math.min(1040, $("plots").clientWidth - 40)) : 420;
  const beside = p.bands.length && W > 700, H = large ? 300 : 190, L = 58, R = beside ? 210 : 14, T = p.bands.length && !beside ? 22 : 10, B = 30;
  const all = p.lines.flatMap((l) => l.y), xs = p.lines.flatMap((l) => l.x);
  const scale = p.log ? Math.log10 : (v) => v;
  let low = Math.min(...all), high = Math.max(...all);
  for (const [, v] of p.bands) if (!p.log || v > 0) { low = Math.min(low, v); high = Math.max(high, v); }
  let a = scale(low), b = scale(high);
  const room = (b - a) * 0.05 || Math.abs(a) * 0.1 || 1;
  a -= room; b += room;
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const px = (x) => L + ((x - x0) / (x1 - x0)) * (W - L - R), py = (y) => T + (1 - (scale(y) - a) / (b - a)) * (H - T - B);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": summary(p) });
  for (const v of ticks(a, b, p.log)) {
    svg.append(draw("line", { class: "grid", x1: L, x2: W - R, y1: py(v), y2: py(v) }));
    svg.append(draw("text", { x: L - 8, y: py(v) + 4, "text-anchor": "end" }, tick_(v, p.unit)));
  }
  for (const v of ticks(x0, x1, false, large ? 8 : 4)) svg.append(draw("text", { x: px(v), y: H - 8, "text-anchor": "middle" }, Math.round(v).toLocaleString("en")));
  let floor = -Infinity;
  for (const [label, v] of [...p.bands].sort((m, n) => n[1] - m[1])) {
    svg.append(draw("line", { class: "band", x1: L, x2: W - R, y1: py(v), y2: py(v) }));
    floor = Math.max(py(v) + (beside ? 4 : -4), floor + 15);
    svg.append(draw("text", beside ? { x: W - R + 8, y: floor } : { x: W - R, y: floor, "text-anchor": "end" }, `${label} ${num(v)}`));
  }
  p.lines.forEach((l, k) => {
    const group = draw("g", { class: `s${k + 1}` });
    const path = (ys) => l.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`).join("");
    group.append(draw("path", { class: l.mean.length ? "line faint" : "line", d: path(l.y) }));
    if (l.mean.length) group.append(draw("path", { class: "line", d: path(l.mean) }));
    else if (l.x.length <= 40) l.x.forEach((x, i) => group.append(draw("circle", { class: "dot", cx: px(x), cy: py(l.y[i]), r: 3.5 })));
    svg.append(group);
  });
  const legend = el("ul", { class: "legend" }, ...p.lines.map((l, k) => el("li", {}, el("i", { class: `s${k + 1}`, "aria-hidden": "true" }), p.lines.length > 1 ? `${l.label} ` : "last ", el("b", {}, tick_(l.y[l.y.length - 1], p.unit)))));
  const unit = p.unit === "share" ? "" : p.unit;
  return el("figure", { class: `card ${p.size}` }, el("h3", {}, [p.title, p.title.toLowerCase().startsWith(unit) ? "" : unit, p.log ? "logarithmic" : ""].filter(Boolean).join(", ")), legend, svg);
}

const tick_ = (v, unit) => (unit === "share" ? `${+(100 * v).toPrecision(3)} %` : num(v));

function summary(p) {
  return `${p.title} over optimizer steps. ` + p.lines.map((l) => `${l.label}: ${tick_(l.y[0], p.unit)} at step ${Math.round(l.x[0])}, ${tick_(l.y[l.y.length - 1], p.unit)} at step ${Math.round(l.x[l.x.length - 1])}`).join("; ");
}

function ticks(a, b, log, about = 5) {
  if (log) {
    const found = [];
    const steps = b - a > 3 ? [1] : b - a > 1.5 ? [1, 3] : [1, 2, 5];
    for (let e = Math.floor(a); e <= Math.ceil(b); e++) for (const f of steps) { const v = f * 10 ** e; if (Math.log10(v) >= a && Math.log10(v) <= b) found.push(v); }
    return found;
  }
  const raw = (b - a) / about, size = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].find((f) => f * size >= raw) * size;
  const found = [];
  for (let k = Math.ceil(a / step); k * step <= b + step * 1e-9 && found.length < 50; k++) found.push(k * step);
  return found;
}

// ------------------------------------------------------------------------------------------------------- golden set

function showGolden() {
  const n = album.steps.length;
  $("golden").hidden = !n || !album.cards.length;
  if (!n) return;
  const range = $("step"), at = $("follow").checked ? n - 1 : Math.min(+range.value, n - 1);
  range.max = n - 1;
  range.value = at;
  range.disabled = n < 2;
  $("at").textContent = album.steps[at].toLocaleString("en");
  range.setAttribute("aria-valuetext", `step ${album.steps[at]}`);
  $("told").textContent = album.told[at] + (album.left_out ? ` · ${album.left_out} steps between are left out` : "");
  $("cards").replaceChildren(...album.cards.map((c) => card(c, c.shown[at])));
}

function card(c, shown) {
  const pictures = el("div", { class: "pictures" });
  c.images.forEach((data, k) => {
    if (!/^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$/.test(data)) return;
    pictures.append(el("img", { src: data, alt: c.images.length > 1 ? `image ${k + 1} of ${c.id}` : `image of ${c.id}` }));
  });
  const state = shown ? shown.state : "unknown";
  const mark = state === "right" ? "✓ " : state === "wrong" ? "✗ " : "";
  const says = el("p", { class: `says${shown && shown.new ? " new" : ""}` }, el("span", { class: "mark", "aria-label": state === "unknown" ? false : state }, mark), shown ? shown.text || "(nothing)" : "not asked at this step");
  const rest = state === "right" ? [] : [el("p", { class: "ref" }, `reference: ${c.reference}`)];
  return el("li", { class: state }, pictures, el("p", { class: "q" }, c.question || c.id), says, ...rest);
}

$("step").addEventListener("input", () => {
  $("follow").checked = album !== null && +$("step").value === album.steps.length - 1;
  showGolden();
});
$("follow").addEventListener("change", showGolden);

tick();
