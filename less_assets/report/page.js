"use strict";
// The page of a selection: the overview, the list and its filters. An opened row is `row.js`, marks `marking.js`, other
// recipes `comparison.js`; `start.js` is last. Text of the pool reaches the document through `textContent` only; nothing is ever parsed as
// HTML, no address is made of data, and the content security policy forbids every request.

const byId = (id) => document.getElementById(id);

/** A new element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "on") for (const [event, does] of Object.entries(value)) element.addEventListener(event, does);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const whole = new Intl.NumberFormat("en");
const percent = (share) => (share >= 0.0995 || share === 0 ? Math.round(share * 100) : (share * 100).toFixed(1)) + " %";
const number = (value) => (value === null ? "–" : Number(value).toPrecision(3).replace(/^(-?0\.\d*?)e/, "$1e"));
const signed = (value) => (value === null ? "–" : (value >= 0 ? "+" : "−") + number(Math.abs(value)));

/** JSON out of an inert script element: base64 of gzip. */
async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const GROUPS = {
  selected: ["Selected", "rank"],
  below_cut: ["Just below the cut", "rank"],
  most_negative: ["Most negative", "rank"],
};
const FILTERS = [
  ["subtask", "Subtask"],
  ["source", "Source"],
  ["length", "Length"],
  ["turn_class", "Turns"],
  ["certain", "Certainty"],
  ["duplicate", "Near-duplicate"],
];
const FACET_COLUMN = { turns: "turn_class" };
const ROW_HEIGHT = 56;
const PREVIEW_CHARACTERS = 180;

let head, columns, count;
let details = [];
let words = []; // lower-case text of each row, to search in; filled package by package
let previews = []; // beginning of each row's question, and of its last turn; filled alike
const packages = [...document.querySelectorAll("script.package")];
let perPackage = 0;
const unpacking = new Map();
const state = { group: "selected", sort: "rank", descending: false, search: "", only: {}, without: null };
let shown = [];
let focused = 0;
let printing = false;

// ---- rows ----

/** What opening a row shows; unpacks its package at first use. */
async function detailOf(row) {
  const place = Math.floor(row / perPackage);
  if (!unpacking.has(place)) unpacking.set(place, unpack(packages[place]).then((part) => keep(place, part)));
  await unpacking.get(place);
  return details[row];
}

function keep(place, part) {
  part.forEach((detail, index) => {
    const row = place * perPackage + index;
    details[row] = detail;
    const spoken = detail.messages.map(fullText).join("\n");
    words[row] = `${spoken}\n${columns.id[row]}\n${detail.file}`.toLowerCase();
    const asked = detail.messages.find(([role]) => role === "user") ?? detail.messages[0];
    previews[row] = [beginning(fullText(asked)), beginning(fullText(detail.messages.at(-1)))];
  });
}

/** A call as a person reads it; arguments are text or an object. */
const callText = ({ name, arguments: given }) => `${name}(${typeof given === "string" ? given : JSON.stringify(given ?? {})})`;

/** All that a turn says: its thoughts, its text, its calls. */
const fullText = ([, text, more]) => [more?.reasoning, text, ...(more?.calls ?? []).map(callText)].filter(Boolean).join("\n");

/** Some text on one line, as much of it as a line can show. */
const beginning = (text, from = 0) =>
  text.slice(from, from + 2 * PREVIEW_CHARACTERS).trim().replace(/\s+/g, " ").slice(0, PREVIEW_CHARACTERS);

/** Unpack everything while nothing else is going on, so that a search looks into whole conversations. */
async function unpackAll() {
  for (let place = 0; place < packages.length; place += 1) {
    await new Promise((go) => (window.requestIdleCallback ? requestIdleCallback(go, { timeout: 300 }) : setTimeout(go)));
    await detailOf(place * perPackage);
  }
  document.documentElement.dataset.unpacked = "yes";
  performance.mark("texts unpacked");
  if (state.search || state.sort === "preview" || state.without !== null) refresh();
  else describeCount();
}

function valueOf(column, row) {
  const value = columns[column][row];
  if (column === "certain") return value === null ? null : value ? "certain" : "borderline";
  if (column === "duplicate") return value !== null && value >= head.near_duplicate ? "yes" : "no";
  return value;
}

function matches(row) {
  if (columns.group[row] !== state.group) return false;
  for (const [column, value] of Object.entries(state.only)) if (valueOf(column, row) !== value) return false;
  if (state.without !== null && details[row]?.also.includes(state.without)) return false;
  if (!state.search) return true;
  const text = words[row] ?? columns.id[row];
  return sought().every((word) => text.includes(word));
}

const sought = () => (state.search ? state.search.split(/\s+/) : []);

function refresh() {
  shown = [];
  for (let row = 0; row < count; row += 1) if (matches(row)) shown.push(row);
  const values = state.sort === "preview" ? columns.id.map((_, row) => previews[row]?.[0] ?? null) : columns[state.sort];
  const direction = state.descending ? -1 : 1;
  shown.sort((a, b) => {
    const [one, two] = [values[a], values[b]];
    if (one === two) return columns.rank[a] - columns.rank[b];
    if (one === null || two === null) return one === null ? 1 : -1;
    return (one < two ? -1 : 1) * direction;
  });
  focused = 0;
  byId("grid").scrollTop = 0;
  byId("body").style.height = `${shown.length * ROW_HEIGHT}px`;
  byId("grid").setAttribute("aria-rowcount", shown.length + 1);
  describeCount();
  drawLines(true);
  drawControls();
  performance.mark("rows drawn");
}

function describeCount() {
  const total = columns.group.filter((group) => group === state.group).length;
  const searching = (state.search || state.without !== null) && !document.documentElement.dataset.unpacked ? " (still reading the texts)" : "";
  byId("count").textContent =
    (shown.length === total ? `${whole.format(total)} ${total === 1 ? "row" : "rows"}` : `${whole.format(shown.length)} of ${whole.format(total)} rows`) +
    searching;
}

// ---- the list: only the lines in sight exist ----

const lines = new Map();

function headings() {
  const scored = [
    ["rank", "Rank", "number"],
    ["score", "Score", "number"],
    ["preview", "Prompt and answer", "said"],
    ["subtask", "Subtask", "extra muted"],
    ["source", "Source", "extra muted"],
    ["tokens", "Tokens", "number extra muted"],
    ["duplicate", "Nearest", "number extra muted"],
  ];
  return head.scored ? scored : scored.filter(([name]) => !["score", "subtask", "duplicate"].includes(name));
}

function lineOf(index) {
  const row = shown[index];
  const cells = headings().map(([column, , style]) => {
    const cell = make("div", { role: "gridcell", class: style });
    const value = columns[column]?.[row];
    if (column === "preview") {
      if (previews[row]) cell.append(...said(row));
      else detailOf(row).then(() => { if (shown[index] === row) cell.replaceChildren(...said(row)); });
    } else if (column === "score") cell.textContent = signed(value);
    else if (column === "duplicate") cell.textContent = value === null ? "–" : value.toFixed(2);
    else cell.textContent = value === null ? "–" : column === "rank" || column === "tokens" ? whole.format(value) : value;
    return cell;
  });
  const line = make("div", {
    role: "row",
    class: "line",
    tabindex: index === focused ? 0 : -1,
    "aria-rowindex": index + 2,
    "data-index": index,
  }, ...cells);
  line.style.transform = `translateY(${index * ROW_HEIGHT}px)`;
  return line;
}

/** How a row begins: its question with tags, and below it its answer or, in a search, what was found. */
function said(row) {
  const [asked, answered] = previews[row];
  const first = make("span", { class: "first" }, make("bdi", { class: "prompt" }, ...marked(asked)));
  if (columns.certain[row] === false) first.append(make("span", { class: "tag warn" }, "borderline"));
  if (valueOf("duplicate", row) === "yes") first.append(make("span", { class: "tag" }, "near-duplicate"));
  if (marks.has(columns.id[row])) first.append(make("span", { class: "tag out" }, "to leave out"));
  const found = foundElsewhere(row, `${asked}\n${answered}`);
  return [first, make("span", { class: "second" }, make("bdi", {}, ...marked(found ?? answered)))];
}

/** The surroundings of a sought word that the beginnings do not show; null if they show them all. */
function foundElsewhere(row, visible) {
  const hidden = sought().find((word) => !visible.toLowerCase().includes(word));
  if (hidden === undefined) return null;
  for (const turn of details[row].messages) {
    const text = fullText(turn);
    const place = text.toLowerCase().indexOf(hidden);
    if (place >= 0) return `…${beginning(text, Math.max(0, place - 24))}`;
  }
  return null;
}

/** A text in which the sought words are marked. */
function marked(text) {
  const small = text.toLowerCase();
  // Few letters change their number of characters in lower case; where one did, places would not fit.
  const places = small.length === text.length ? sought().map((word) => [small.indexOf(word), word.length]) : [];
  const parts = [];
  let done = 0;
  for (const [place, length] of places.filter(([place]) => place >= 0).sort((a, b) => a[0] - b[0])) {
    if (place < done) continue;
    parts.push(text.slice(done, place), make("mark", {}, text.slice(place, place + length)));
    done = place + length;
  }
  return [...parts, text.slice(done)];
}

/** Draw the lines in sight, on paper all; `anew` replaces those that are there. */
function drawLines(anew = false) {
  const body = byId("body");
  if (anew) {
    lines.forEach((line) => line.remove());
    lines.clear();
    body.querySelector(".empty")?.remove();
    if (!shown.length) body.append(make("p", { class: "empty" }, "No row is like that."));
  }
  const { scrollTop, clientHeight } = byId("grid");
  const first = printing ? 0 : Math.max(0, Math.floor(scrollTop / ROW_HEIGHT) - 6);
  const last = printing ? shown.length : Math.min(shown.length, Math.ceil((scrollTop + clientHeight) / ROW_HEIGHT) + 6);
  for (const [index, line] of lines) {
    if ((index < first || index >= last) && index !== focused) {
      line.remove();
      lines.delete(index);
    }
  }
  for (let index = first; index < last; index += 1) {
    if (!lines.has(index)) {
      lines.set(index, lineOf(index));
      body.append(lines.get(index));
    }
  }
}

function focusLine(index) {
  if (!shown.length) return;
  lines.get(focused)?.setAttribute("tabindex", -1);
  focused = Math.max(0, Math.min(shown.length - 1, index));
  const grid = byId("grid");
  const top = focused * ROW_HEIGHT;
  const room = grid.clientHeight - byId("headings").offsetHeight; // the headings stay in sight
  if (top < grid.scrollTop) grid.scrollTop = top;
  if (top + ROW_HEIGHT > grid.scrollTop + room) grid.scrollTop = top + ROW_HEIGHT - room;
  drawLines();
  lines.get(focused).setAttribute("tabindex", 0);
  lines.get(focused).focus({ preventScroll: true });
}

function listKeys(event) {
  const page = Math.max(1, Math.floor(byId("grid").clientHeight / ROW_HEIGHT) - 2);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -count, End: count };
  if (event.key in moves) focusLine(focused + moves[event.key]);
  else if (event.key === "Enter" || event.key === " ") open(shown[focused]);
  else if (event.key === "x" && shown.length) open(shown[focused]).then(() => byId("reason").focus());
  else return;
  event.preventDefault();
}

// ---- controls ----

function setOnly(column, value) {
  if (value) state.only[column] = value;
  else delete state.only[column];
  refresh();
}

function drawControls() {
  for (const button of byId("groups").children)
    button.setAttribute("aria-pressed", button.dataset.group === state.group);
  for (const heading of byId("headings").children) {
    const own = heading.dataset.column === state.sort;
    heading.setAttribute("aria-sort", own ? (state.descending ? "descending" : "ascending") : "none");
  }
  for (const select of byId("filters").querySelectorAll("select")) select.value = state.only[select.dataset.column] ?? "";
  for (const button of document.querySelectorAll(".facet button"))
    button.setAttribute("aria-pressed", state.only[button.dataset.column] === button.dataset.value);
  for (const name of ["copy", "download", "mark-all"]) byId(name).disabled = !shown.length;
  const without = byId("filters").querySelector("#without");
  if (without) without.value = state.without ?? "";
  byId("clear").disabled = !state.search && state.without === null && !Object.keys(state.only).length;
}

function buildControls() {
  for (const [group, [label]] of Object.entries(GROUPS)) {
    const rows = columns.group.filter((each) => each === group).length;
    if (!rows && group !== "selected") continue;
    const choose = () => { state.group = group; refresh(); };
    byId("groups").append(
      make("button", { type: "button", "data-group": group, on: { click: choose } }, `${label} · ${whole.format(rows)}`)
    );
  }
  for (const [column, label] of FILTERS) {
    const values = [...new Set(columns[column].map((_, row) => valueOf(column, row)))].filter((value) => value !== null);
    if (values.length < 2) continue;
    const ordered = head.composition.find((part) => (FACET_COLUMN[part.name] ?? part.name) === column);
    const order = ordered ? ordered.classes.map(([name]) => name) : [];
    values.sort((a, b) => order.indexOf(a) - order.indexOf(b) || (a < b ? -1 : 1));
    const select = make("select", { "data-column": column, on: { change: (event) => setOnly(column, event.target.value) } },
      make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
    byId("filters").append(make("label", {}, label, select));
  }
  if (head.overlap.length) {
    const choose = (event) => { state.without = event.target.value === "" ? null : Number(event.target.value); refresh(); };
    byId("filters").append(make("label", {}, "Not chosen by", make("select", { id: "without", on: { change: choose } },
      make("option", { value: "" }, "–"), ...head.overlap.map(({ recipe }, place) => make("option", { value: place }, recipe)))));
  }
  for (const [column, label, style] of headings()) {
    const choose = () => {
      const again = state.sort === column;
      state.descending = again ? !state.descending : ["score", "tokens", "duplicate"].includes(column);
      state.sort = column;
      refresh();
    };
    byId("headings").append(
      make("div", { role: "columnheader", class: style.replace("muted", ""), "data-column": column },
        make("button", { type: "button", on: { click: choose } }, label))
    );
  }
  let waiting;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.search = byId("search").value.trim().toLowerCase(); refresh(); }, 60);
  });
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => clearAll());
  byId("copy").addEventListener("click", copyIds);
  byId("download").addEventListener("click", downloadRows);
  const body = byId("body");
  byId("grid").addEventListener("scroll", () => drawLines(), { passive: true });
  body.addEventListener("keydown", listKeys);
  body.addEventListener("click", (event) => {
    const line = event.target.closest(".line");
    if (line) { focusLine(Number(line.dataset.index)); open(shown[focused]); }
  });
  window.addEventListener("resize", () => drawLines());
}

/** Put the ids of the rows in the list on the clipboard, one a line. */
function copyIds() {
  const ids = shown.map((row) => columns.id[row]);
  copyText(`${ids.join("\n")}\n`, `${whole.format(ids.length)} ${ids.length === 1 ? "id" : "ids"} copied, one a line`, byId("count"));
}

/** Put a text on the clipboard and say so. */
async function copyText(text, said, status) {
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = said;
  } catch {
    status.textContent = "The browser does not let this page copy.";
  }
}

/** Save JSON lines as a file; nothing leaves the machine. */
function save(name, records) {
  const lines = records.map((record) => `${JSON.stringify(record)}\n`);
  const address = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

/** Save the rows in the list, in its order, as subset.jsonl has them. */
async function downloadRows() {
  const rows = [...shown];
  for (const row of rows) await detailOf(row);
  save(`${head.project}-${head.recipe}-${head.task}-rows.jsonl`, rows.map((row) => ({
    example_id: columns.id[row], source: columns.source[row], rank: columns.rank[row], score: columns.score[row],
    subtask: columns.subtask[row], group: columns.group[row],
    messages: details[row].messages.map(forTrainers),
    ...(details[row].tools ? { tools: JSON.parse(details[row].tools) } : {}),
  })));
  byId("count").textContent = `${whole.format(rows.length)} ${rows.length === 1 ? "row" : "rows"} saved as JSON lines`;
}

/** A turn as trainers read it. */
function forTrainers([role, content, more]) {
  const turn = { role, content };
  if (more?.reasoning) turn.reasoning_content = more.reasoning;
  if (more?.calls) {
    turn.tool_calls = more.calls.map((call, place) =>
      ({ ...(more.call_ids?.[place] ? { id: more.call_ids[place] } : {}), type: "function", function: call }));
  }
  if (more?.call_id) turn.tool_call_id = more.call_id;
  if (more?.name) turn.name = more.name;
  if (more?.masked) turn.weight = 0;
  return turn;
}

function clearAll(only = {}, group = state.group) {
  state.search = byId("search").value = "";
  state.only = only;
  state.without = null;
  state.group = group;
  refresh();
}

// ---- the upper part ----

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

function buildOverview() {
  const { counts } = head;
  byId("project").textContent = `${head.project} · selection report`;
  byId("title").textContent = `What ${head.recipe} selected for ${head.task}`;
  byId("settings").append(...head.settings.map(([name, value]) => fact(name, value)));
  const figures = [
    [`rows of ${whole.format(counts.pool)} in the pool`, `${whole.format(counts.selected)} (${percent(counts.selected / counts.pool)})`],
    [counts.estimated ? "answer tokens, estimated" : "loss tokens", whole.format(counts.tokens)],
  ];
  const cuts = Object.values(head.cuts);
  if (cuts.length) {
    const [low, high] = [Math.min(...cuts), Math.max(...cuts)];
    figures.push(low === high ? ["score at the cut", signed(low)] : ["score at the cuts", `${signed(low)} to ${signed(high)}`]);
  }
  if (head.scored)
    figures.push(head.certificate
      ? ["certain rows; the others are borderline", whole.format(counts.certain)]
      : ["fidelity was not measured", "no certificate"]);
  byId("figures").append(...figures.map(([name, value]) => fact(name, value)));
  byId("cut").hidden = !head.scored;
  if (head.certificate) byId("cut").append(make("p", { class: "hint" }, head.certificate));
  byId("notes").append(...head.notes.map(noteItem));
  if (!head.notes.length) byId("notes").append(make("li", {}, "Nothing stands out."));
  buildChoice();
  byId("composition").append(...head.composition.filter((part) => part.classes.length > 1).map(facet));
  const uniform = head.composition.filter((part) => part.classes.length === 1);
  byId("uniform").textContent = uniform.map(({ title, classes }) => `${title}: all ${classes[0][0]}`).join(" · ");
  byId("overlap").hidden = !head.overlap.length;
  byId("overlap-rows").append(...head.overlap.map((other) =>
    make("tr", {}, make("th", { scope: "row" }, reportLink(other.recipe)), make("td", {}, whole.format(other.rows)),
      make("td", {}, whole.format(other.shared)), make("td", {}, percent(other.shared / Math.max(1, counts.selected))),
      make("td", {}, whole.format(other.expected)))));
  byId("reports").append(...head.tasks.filter((task) => task !== head.task).flatMap((task) => [" ", reportLink(head.recipe, task, task)]));
  byId("reports").hidden = head.tasks.length < 2;
  byId("turns").hidden = !head.turns.length;
  byId("turns").textContent = takingTurns();
  byId("inputs").append(...Object.entries(head.inputs).map(([name, version]) =>
    make("tr", {}, make("td", {}, name), make("td", {}, make("code", {}, version)))));
}

/** The candidates of a tournament, and why one of them selected these rows. */
function buildChoice() {
  byId("choice").hidden = !head.choice;
  if (!head.choice) return;
  byId("choice-why").textContent = `${head.choice.why}.`;
  byId("choice-headings").append(...head.choice.columns.map((name) => make("th", { scope: "col" }, name)));
  byId("choice-rows").append(...head.choice.rows.map(([name, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell)))));
}

/** A link to the page of another recipe or task, by an address that stays when the page is made anew. */
function reportLink(recipe, task = head.task, words = recipe) {
  const href = `../../../../${encodeURIComponent(task)}/reports/${encodeURIComponent(recipe)}/index.html`;
  return make("a", { href }, words);
}

/** Why scores do not fall down the list where several take turns. */
function takingTurns() {
  const [first, second] = head.turns;
  return head.turns.length < 2 ? "" :
    `${head.turns.length} subtasks take turns: one row for ${first}, then one for ${second}, and so on, each time the best row that is left for it. ` +
    "Scores fall among the rows of one subtask; over the whole list a row can score less than the next one, which was taken for another subtask.";
}

function noteItem({ text, filter }) {
  const item = make("li", {}, make("span", {}, text));
  if (filter) {
    const { group = "selected", ...only } = filter;
    const show = () => { clearAll(only, group); byId("rows").scrollIntoView(); };
    item.append(make("button", { type: "button", "aria-label": `Show rows: ${text}`, on: { click: show } }, "Show"));
  }
  return item;
}

function facet({ name, title, classes }) {
  const column = FACET_COLUMN[name] ?? name;
  const chosen = classes.reduce((sum, [, own]) => sum + own, 0) || 1;
  const all = classes.reduce((sum, [, , pool]) => sum + pool, 0) || 1;
  const most = Math.max(...classes.map(([, own, pool]) => Math.max(own / chosen, pool / all)));
  const items = classes.map(([label, own, pool]) => {
    const [share, ofPool] = [own / chosen, pool / all];
    const bar = make("span", { class: "share" });
    bar.style.width = `${(100 * share) / most}%`;
    const marker = make("span", { class: "of-pool" });
    marker.style.left = `${(100 * ofPool) / most}%`;
    const ratio = pool ? (share / ofPool >= 9.95 ? Math.round(share / ofPool) : (share / ofPool).toFixed(1)) + "×" : "";
    const words = `${label}: ${percent(share)} of the selection, ${percent(ofPool)} of the pool`;
    const choose = () => {
      setOnly(column, state.only[column] === label ? "" : label);
    };
    return make("li", {}, make("button", {
      type: "button", title: words, "aria-label": words, "aria-pressed": "false",
      "data-column": column, "data-value": label, on: { click: choose },
    }, make("span", { class: "name" }, make("bdi", {}, label)), make("span", { class: "track" }, bar, marker),
    make("span", { class: "value" }, percent(share)), make("span", { class: "ratio" }, ratio)));
  });
  return make("div", { class: "facet" }, make("h3", {}, title), make("ul", {}, ...items));
}
