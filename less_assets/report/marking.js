// Rows that a person marks to be left out, with a reason: kept by the browser, copied as a file that `exclude` of the
// project file names. Rows that are left out already are listed.

const LISTED_ROWS = 500; // that a table shows; the copied file has all
const marks = new Map(); // id -> reason, of this page's rows and of other pages of the project
const storageKey = () => `less-assets left out of ${head.project}`;

function readMarks() {
  const done = new Set(head.excluded.map(([id]) => id));
  try {
    const kept = JSON.parse(localStorage.getItem(storageKey()) ?? "[]");
    for (const [id, reason] of kept) if (!done.has(id)) marks.set(String(id), String(reason));
  } catch { /* a browser that keeps nothing for pages on disk: marks last as long as the page is open */ }
}

function keepMarks() {
  try {
    localStorage.setItem(storageKey(), JSON.stringify([...marks]));
  } catch { /* as above */ }
}

/** Mark rows, or take their marks back with a reason of null; draws what shows marks. */
function mark(rows, reason) {
  for (const row of rows) {
    if (reason === null) marks.delete(columns.id[row]);
    else marks.set(columns.id[row], reason);
  }
  keepMarks();
  drawMarks();
  drawLines(true);
}

/** In an open row: whether it is marked, and the field for the reason. */
function showMark(row) {
  const reason = marks.get(columns.id[row]);
  byId("reason").value = reason ?? "";
  byId("reason-form").classList.toggle("marked", reason !== undefined);
  byId("mark").textContent = reason === undefined ? "Leave out" : "Change reason";
  byId("unmark").hidden = reason === undefined;
}

const markLines = () => [...marks].map(([example_id, reason]) => ({ example_id, reason }));

const onlySome = (rows) => (rows > LISTED_ROWS ? ` The first ${LISTED_ROWS} are listed.` : "");

function drawMarks() {
  byId("mark-count").textContent = marks.size
    ? `${whole.format(marks.size)} ${marks.size === 1 ? "row" : "rows"} marked.${onlySome(marks.size)}` : "No row is marked.";
  for (const name of ["marks-copy", "marks-save", "marks-clear"]) byId(name).disabled = !marks.size;
  byId("marks").hidden = !marks.size;
  byId("mark-rows").replaceChildren(...[...marks].slice(0, LISTED_ROWS).map(([id, reason]) => {
    const row = columns.id.indexOf(id);
    const show = row < 0 ? "on another page" :
      make("button", { type: "button", on: { click: () => open(row) } }, "Open");
    const keep = () => { marks.delete(id); keepMarks(); drawMarks(); drawLines(true); byId("left-out-title").focus(); };
    return make("tr", {}, make("td", {}, make("code", {}, id.slice(0, 12))), make("td", {}, make("bdi", {}, reason || "–")),
      make("td", {}, show), make("td", {}, make("button", { type: "button", "aria-label": `Keep ${id.slice(0, 12)}`, on: { click: keep } }, "Keep")));
  }));
}

function buildMarks() {
  readMarks();
  byId("reason-form").addEventListener("submit", (event) => {
    event.preventDefault();
    mark([opened], byId("reason").value.trim());
    showMark(opened);
  });
  byId("unmark").addEventListener("click", () => { mark([opened], null); showMark(opened); byId("reason").focus(); });
  byId("mark-all").addEventListener("click", () => { byId("mark-all-form").hidden = false; byId("reason-for-all").focus(); });
  byId("mark-all-cancel").addEventListener("click", () => { byId("mark-all-form").hidden = true; byId("mark-all").focus(); });
  byId("mark-all-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("mark-all-form").hidden = true;
    mark(shown, byId("reason-for-all").value.trim());
    byId("count").textContent = `${whole.format(shown.length)} marked to be left out`;
    byId("mark-all").focus();
  });
  const text = () => markLines().map((line) => `${JSON.stringify(line)}\n`).join("");
  byId("marks-copy").addEventListener("click", () =>
    copyText(text(), "Copied. Add it to a file that the project file names under exclude.", byId("mark-count")));
  byId("marks-save").addEventListener("click", () => save("left-out.jsonl", markLines()));
  byId("marks-clear").addEventListener("click", () => { marks.clear(); keepMarks(); drawMarks(); drawLines(true); byId("left-out-title").focus(); });
  byId("excluded").hidden = !head.excluded.length;
  byId("excluded-title").textContent = `Left out already: ${whole.format(head.excluded.length)}.${onlySome(head.excluded.length)}`;
  byId("excluded-rows").append(...head.excluded.slice(0, LISTED_ROWS).map(([id, reason]) =>
    make("tr", {}, make("td", {}, make("code", {}, id)), make("td", {}, make("bdi", {}, reason || "–")))));
  drawMarks();
}
