// The console. Everything shown comes from the lookups of this service; texts are set as text, never as markup.
"use strict";

const at = id => document.getElementById(id);
const DAY = 86400000, SHOWN = 50, AHEAD = 60, STEPS = 12;
let followed = null, waiting = null, page = { id: null, before: null, now: 0 };

function el(tag, text, cls) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  return made;
}
function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
const when = ms => new Date(Number(ms)).toISOString().slice(0, 19).replace("T", " ");
const percent = p => p === undefined ? "–" : (100 * p).toFixed(1) + " %";
function say(text) { at("message").textContent = text || ""; at("message").hidden = !text; }

async function ask(path, body, signal) {
  const headers = {}, token = sessionStorage.getItem("token");
  if (token) headers.Authorization = "Bearer " + token;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) });
  if (answer.status === 401) at("login").hidden = false;
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ message: answer.statusText }));
    throw new Error(problem.message);
  }
  return answer;
}
const json = async (path, body, signal) => (await ask(path, body, signal)).json();
const of = (id, what) => `/v1/customers/${encodeURIComponent(id)}/${what}`;

// -- live scores

async function follow() {
  followed?.abort();
  const mine = followed = new AbortController();
  const bands = [...document.querySelectorAll("input[name=band]:checked")].map(box => "band=" + box.value);
  let seen = 0, since = Date.now();
  while (!mine.signal.aborted) {
    try {
      const answer = await ask("/v1/scores/stream?" + bands.join("&"), null, mine.signal);
      say("");
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let left = "";;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (left + value).split("\n");
        left = lines.pop();
        for (const line of lines) { show(JSON.parse(line)); seen++; }
        if (Date.now() - since > 1000) {
          at("rate").textContent = Math.round(1000 * seen / (Date.now() - since)) + " scores a second";
          seen = 0; since = Date.now();
        }
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      say("Live scores: " + error.message);
    }
    await new Promise(done => setTimeout(done, 2000));
  }
}

let queue = [], due = false;
function show(score) {
  if (at("pause").getAttribute("aria-pressed") === "true") return;
  queue.push(score);
  if (queue.length > SHOWN) queue.shift();
  if (!due) { due = true; setTimeout(draw, 100); }  // ten pictures a second are enough
}
function draw() {
  due = false;
  const body = at("scores");
  for (const score of queue) {
    const row = el("tr"), link = el("a", score.customer_id), cell = el("td");
    link.href = "#/c/" + encodeURIComponent(score.customer_id);
    cell.append(link);
    row.append(el("td", when(score.at_ms)), cell, el("td", percent(score.probability)), el("td", score.band, score.band),
      el("td", score.reasons.length ? score.reasons[0].text : ""));
    body.prepend(row);
  }
  queue = [];
  at("none").hidden = true;
  while (body.rows.length > SHOWN) body.deleteRow(-1);
}

// -- one customer

function bars(home, parts) {
  const most = Math.max(1e-9, ...parts.map(part => Math.abs(part.contribution ?? 0)));
  home.replaceChildren(...parts.map(part => {
    const row = el("div", undefined, "reason"), way = part.raises ? "up" : "down";
    row.append(el("span", part.text));
    const picture = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    const size = 50 * Math.abs(part.contribution ?? most / 2) / most;
    picture.append(drawn("line", { x1: 50, x2: 50, y1: 0, y2: 10, class: "axis" }),
      drawn("rect", { x: part.raises ? 50 : 50 - size, y: 1, width: size, height: 8, class: way }));
    row.append(picture, el("span", part.contribution === undefined ? way : (part.raises ? "+" : "−") + Math.abs(part.contribution).toFixed(3), way));
    return row;
  }));
}

function card(name, value, cls) {
  const made = el("div");
  made.append(el("span", name, "quiet"), el("b", value, cls));
  return made;
}

async function customer(id) {
  page = { id, before: null, now: 0 };
  at("who").textContent = "Customer " + id;
  for (const part of ["now", "reasons", "curve", "changes", "plans", "facts"]) at(part).replaceChildren();
  for (const part of ["sum", "outcome"]) at(part).textContent = "";
  at("more").hidden = true;
  at("who").focus();
  try {
    const { score } = await json(of(id, "score"));
    if (page.id !== id) return;
    page.now = Number(score.at_ms);
    const fresh = score.freshness;
    at("now").replaceChildren(card("Risk now", percent(score.probability), score.band), card("Band", score.band, score.band),
      card("Status", score.status.replace("_", " ")),
      card("Newest event", fresh.newest_ms ? when(fresh.newest_ms) : "never"),
      card("Complete up to", fresh.staleness_ms === undefined ? "not known" : fresh.staleness_ms + " ms ago"));
    if (score.last) at("now").append(card("Last score of the stream", `${percent(score.last.probability)} at ${when(score.last.at_ms)}`, score.last.band));
    if (score.status === "unknown") return;
    await Promise.all([why(id), curve(id), facts(id)].map(part => part.catch(error => say(error.message))));
  } catch (error) { say(error.message); }
}

async function why(id) {
  const made = await json(of(id, "explanation"));
  bars(at("reasons"), made.contributions.slice(0, 12));
  if (made.margin !== undefined)
    at("sum").textContent = `bias ${made.bias.toFixed(3)} + ${made.contributions.length} contributions = ${made.margin.toFixed(3)} (log-odds), that is ${percent(made.score.probability)}; ${made.method}`;
}

async function curve(id) {
  const steps = Array.from({ length: STEPS + 1 }, (_, i) => page.now + i * AHEAD * DAY / STEPS);
  const found = await Promise.all(steps.map(ms => json(of(id, "score") + "?at_ms=" + Math.round(ms))));
  const values = found.map(one => one.score.probability ?? 0), x = i => 40 + 640 * i / STEPS, y = p => 110 - 100 * p;
  const picture = drawn("svg", { viewBox: "0 0 700 140", role: "img", "aria-label": `Risk from ${percent(values[0])} today to ${percent(values[STEPS])} in ${AHEAD} days without events` });
  for (const p of [0, 0.5, 1]) {
    picture.append(drawn("line", { x1: 40, x2: 680, y1: y(p), y2: y(p), class: "axis" }));
    const label = drawn("text", { x: 0, y: y(p) + 4 }); label.textContent = 100 * p + " %"; picture.append(label);
  }
  picture.append(drawn("polyline", { points: values.map((p, i) => `${x(i)},${y(p)}`).join(" "), class: "curve" }));
  for (let i = 0; i <= STEPS; i += 3) { const label = drawn("text", { x: x(i) - 12, y: 132 }); label.textContent = i * AHEAD / STEPS + " d"; picture.append(label); }
  at("curve").replaceChildren(picture);
}

async function facts(id) {
  const found = await json(of(id, "history") + "?limit=50" + (page.before ? "&before_ms=" + page.before : ""));
  at("facts").append(...found.facts.map(fact => {
    const line = el("li");
    line.append(el("b", fact.kind.replace("_", " ")), ` ${when(fact.event_time_ms)} `,
      el("span", (fact.value === undefined ? "" : `value ${fact.value} · `) + `${fact.topic} ${fact.offset}`, "quiet"));
    return line;
  }));
  page.before = found.facts.at(-1)?.event_time_ms ?? page.before;
  at("more").hidden = found.facts.length < 50;
}

async function whatIf() {
  const form = at("whatif"), id = page.id, end = page.now + Number(form.days.value) * DAY, events = [];
  for (const output of form.querySelectorAll("output")) output.textContent = output.previousElementSibling.value;
  for (const kind of ["login", "payment", "resolved", "opened"])
    for (let i = 0, n = Number(form[kind].value); i < n; i++) {
      const event = { kind, event_time: Math.round(page.now + (end - page.now) * (i + 1) / n) };
      if (kind === "payment") event.amount = Number(form.amount.value || 0).toFixed(2);
      events.push(event);
    }
  waiting?.abort();
  waiting = new AbortController();
  try {
    const made = await json(of(id, "what-if"), { events, at_ms: Math.round(end) }, waiting.signal);
    if (page.id !== id) return;
    at("outcome").textContent = `In ${form.days.value} days: ${percent(made.before.probability)} if nothing happens, ${percent(made.after.probability)} (${made.after.band}) with ${events.length} events.`;
    bars(at("changes"), made.changes.slice(0, 6));
  } catch (error) { if (error.name !== "AbortError") say(error.message); }
}

async function plans() {
  at("plans").replaceChildren(el("li", "looking…"));
  try {
    const found = await json(of(page.id, "plans"));
    at("plans").replaceChildren(...(found.plans.length ? found.plans.map(plan => el("li", `${plan.text}: ${percent(plan.probability)} (${plan.band})`))
      : [el("li", found.tried ? `None of ${found.tried} plans brings it below ${percent(found.below)}.` : "The risk is low already.")]));
  } catch (error) { say(error.message); }
}

// -- around it

function route() {
  say("");
  const id = location.hash.startsWith("#/c/") ? decodeURIComponent(location.hash.slice(4)) : null;
  at("live").hidden = id !== null;
  at("page").hidden = id === null;
  if (id === null) follow(); else { followed?.abort(); customer(id); }
}

at("search").addEventListener("submit", event => {
  event.preventDefault();
  const id = at("customer").value.trim();
  if (id) location.hash = "#/c/" + encodeURIComponent(id);
});
at("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  at("token").value = "";
  at("login").hidden = true;
  route();
});
at("pause").addEventListener("click", () => at("pause").setAttribute("aria-pressed", String(at("pause").getAttribute("aria-pressed") !== "true")));
at("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
at("whatif").addEventListener("input", whatIf);
at("whatif").addEventListener("submit", event => event.preventDefault());
at("plan").addEventListener("click", plans);
at("more").addEventListener("click", () => facts(page.id));
for (const box of document.querySelectorAll("input[name=band]")) box.addEventListener("change", () => { at("scores").replaceChildren(); follow(); });
document.addEventListener("keydown", event => {
  if (event.target instanceof HTMLInputElement) return;
  if (event.key === "/") { event.preventDefault(); at("customer").focus(); }
  if (event.key === "Escape") location.hash = "#/";
});
addEventListener("hashchange", route);
fetch("/version").then(answer => answer.json()).then(found => { at("model").textContent = found.model.version ? "model " + found.model.version : "no model yet"; });
route();
