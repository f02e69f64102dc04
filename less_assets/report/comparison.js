// This selection beside another recipe's: how many rows by source, and what one has and the other has not.

const COMPARED_ROWS = 200; // of each side; all of the other's stand on its own page
let others = null; // unpacked at first use

function buildComparison() {
  byId("compare").hidden = !head.overlap.length;
  byId("compared-with").append(make("option", { value: "" }, "choose a recipe"),
    ...head.overlap.map(({ recipe }, place) => make("option", { value: place }, recipe)));
  byId("compared-with").addEventListener("change", (event) => compare(event.target.value));
}

async function compare(chosen) {
  byId("comparison").hidden = chosen === "";
  if (chosen === "") return;
  others ??= await unpack(byId("others"));
  const place = Number(chosen);
  const other = others[place];
  const mine = columns.id.map((_, row) => row).filter((row) => columns.group[row] === "selected");
  for (const row of mine) await detailOf(row);
  if (byId("compared-with").value !== chosen) return;
  const alone = mine.filter((row) => !details[row].also.includes(place)).sort((a, b) => columns.rank[a] - columns.rank[b]);
  byId("by-source").replaceChildren(...other.sources.map(([source, here, both, there]) =>
    make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, source)), ...[here, both, there].map((rows) => make("td", {}, whole.format(rows))))));
  byId("only-there-heading").textContent = `Only ${other.recipe}`;
  byId("only-here-title").textContent = `Only ${head.recipe}: ${whole.format(alone.length)}`;
  byId("only-there-title").replaceChildren(`Only ${other.recipe}: ${whole.format(other.alone)} · `, reportLink(other.recipe, head.task, "its page"));
  const show = () => { clearAll(); state.without = place; refresh(); byId("rows").scrollIntoView(); byId("search").focus({ preventScroll: true }); };
  byId("only-here").replaceChildren(
    ...alone.slice(0, COMPARED_ROWS).map((row) => comparedRow(columns.rank[row], columns.score[row], ...previews[row],
      make("button", { type: "button", "aria-label": `Open rank ${columns.rank[row]}`, on: { click: () => open(row) } }, "Open"))),
    alone.length > COMPARED_ROWS ? make("li", {}, make("button", { type: "button", on: { click: show } }, "All of them, in the list")) : "",
    alone.length ? "" : none());
  byId("only-there").replaceChildren(
    ...other.rows.map(([id, rank, score, asked, answered]) => {
      const link = reportLink(other.recipe, head.task, "Open");
      link.href += `#row=${encodeURIComponent(id)}`;
      link.setAttribute("aria-label", `Open rank ${rank} of ${other.recipe}`);
      return comparedRow(rank, score, asked, answered, link);
    }),
    other.alone > other.rows.length ? make("li", { class: "hint" }, `The best ${whole.format(other.rows.length)}; all stand on its page.`) : "",
    other.alone ? "" : none());
}

const none = () => make("li", { class: "hint" }, "None.");

function comparedRow(rank, score, asked, answered, opens) {
  return make("li", {},
    make("span", { class: "rank" }, whole.format(rank)),
    make("span", { class: "said" }, make("bdi", { class: "prompt" }, asked), make("span", { class: "second" }, make("bdi", {}, answered))),
    make("span", { class: "value" }, score === null ? "" : signed(score)), opens);
}
