// One opened row of the page of a selection.

let opened = null;

async function open(row) {
  opened = row;
  const dialog = byId("detail");
  byId("reason-form").hidden = false;
  showMark(row);
  const [label] = GROUPS[columns.group[row]];
  byId("detail-title").textContent =
    columns.group[row] === "most_negative" ? `${label}, number ${whole.format(columns.rank[row])}` : `${label === "Selected" ? "Rank" : "Below the cut, rank"} ${whole.format(columns.rank[row])}`;
  const badges = [];
  if (columns.score[row] !== null) badges.push(make("span", { class: "tag" }, `score ${signed(columns.score[row])}`));
  if (columns.certain[row] !== null)
    badges.push(make("span", { class: columns.certain[row] ? "tag good" : "tag warn" }, columns.certain[row] ? "certain" : "borderline"));
  if (valueOf("duplicate", row) === "yes") badges.push(make("span", { class: "tag" }, "near-duplicate in the pool"));
  byId("badges").replaceChildren(...badges.flatMap((badge) => [badge, " "]));
  const place = shown.indexOf(row);
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place < 0 || place >= shown.length - 1;
  if (!dialog.open) dialog.showModal();
  byId("detail-body").replaceChildren(make("p", { class: "waiting" }, "Unpacking…"));
  const detail = await detailOf(row);
  if (opened !== row) return;
  byId("detail-body").replaceChildren(...detailParts(row, detail));
  byId("detail-body").scrollTop = 0;
  history.replaceState(null, "", `#row=${columns.id[row]}`);
}

function detailParts(row, detail) {
  const parts = [conversation(detail), detail.targets ? nearestTargets(detail) : null];
  if (detail.subtasks) parts.push(make("div", { class: "column" }, scoreSplit(row, detail), origin(row, detail)), nearRows(detail));
  else parts.push(origin(row, detail));
  return parts.filter(Boolean);
}

function message(role, ...text) {
  return make("div", { class: `message ${role === "assistant" ? "assistant" : ""}` },
    make("div", { class: "role" }, role), make("div", { class: "text", dir: "auto" }, ...text));
}

/** A turn: its role and name, whether it is masked, its thoughts, its text, its calls. */
function turnOf([role, text, more]) {
  const shown = message(more?.name ? `${role} ${more.name}` : role, text);
  if (more?.masked) shown.firstChild.append(" ", make("span", { class: "tag" }, "no loss"));
  if (more?.reasoning) shown.lastChild.before(make("div", { class: "text thought", dir: "auto" }, more.reasoning));
  shown.append(...(more?.calls ?? []).map((call) => make("div", { class: "text call", dir: "auto" }, callText(call))));
  return shown;
}

/** The tools that a conversation names, folded. */
const toolsOf = ({ tools }) =>
  tools ? make("details", { class: "message" }, make("summary", {}, "Tools"), make("div", { class: "text call" }, tools)) : "";

function conversation(detail) {
  const section = make("section", {}, make("div", { class: "head" }, make("h3", {}, "This row")));
  const { heat } = detail;
  const turns = new Map((heat?.turns ?? []).map(([turn, texts, shares]) => [turn, { texts, shares }]));
  const strongest = Math.max(1e-12, ...[...turns.values()].flatMap(({ shares }) => shares.map(Math.abs)));
  const body = make("div");
  const draw = (warm) => {
    body.replaceChildren(...detail.messages.map((spoken, turn) => warm && turns.has(turn)
      ? message(spoken[0], ...warmed(turns.get(turn), strongest, heat.influence)) : turnOf(spoken)));
  };
  if (heat) {
    const toggle = make("input", { type: "checkbox", id: "heat", checked: "" });
    toggle.addEventListener("change", () => draw(toggle.checked));
    section.firstChild.append(make("label", {}, toggle, " Token heat"));
  }
  draw(Boolean(heat));
  section.append(toolsOf(detail), body);
  if (heat) section.append(legend(heat, strongest), strongestTokens(turns));
  return section;
}

/** Tokens of a turn, tinted by how much each adds to the row's influence, or takes from it. */
function warmed({ texts, shares }, strongest, influence) {
  return texts.map((text, place) => {
    const part = shares[place] / strongest;
    const step = Math.min(4, Math.floor(Math.abs(part) * 4 + 0.6));
    const ofAll = influence ? `, ${percent(Math.abs(shares[place] / influence))} of the row's influence` : "";
    return make("span", {
      class: step ? `token ${part > 0 ? "p" : "n"}${step}` : "token",
      title: `${signed(shares[place])}${ofAll}`,
    }, text);
  });
}

function legend(heat, strongest) {
  const scale = make("span", { class: "scale", "aria-hidden": "true" },
    ...["n4", "n3", "n2", "n1", "p1", "p2", "p3", "p4"].map((name) => make("i", { class: name })));
  const momentum = heat.momentum
    ? ` Momentum, which belongs to no token, adds ${signed(heat.momentum)}.` : "";
  return make("p", { class: "legend" },
    `takes away ${signed(-strongest)}`, scale, `adds ${signed(strongest)}.`,
    make("span", {}, `The shares add up to the row's exact influence, ${signed(heat.influence)}.${momentum}` +
      (heat.cut ? " The row was cut at the model's maximum length." : "")));
}

/** A token's text with its white space to be seen. */
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function strongestTokens(turns) {
  const all = [...turns.values()].flatMap(({ texts, shares }) => texts.map((text, place) => [text, shares[place]]));
  const best = all.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8);
  return make("ul", { class: "tokens", "aria-label": "Tokens with the largest shares" },
    ...best.map(([text, share]) => make("li", {}, make("code", {}, visible(text)), ` ${signed(share)}`)));
}

/** What the first of a row's targets are: the most negative rows begin with the worst, others with the best. */
function effect(targets) {
  const [first, last] = [targets[0][1], targets.at(-1)[1]];
  if (first >= 0) return "helps most";
  return first < last ? "harms most" : "harms least";
}

function nearestTargets(detail) {
  const section = make("section", {}, make("div", { class: "head" }, make("h3", {}, `Target examples that it ${effect(detail.targets)}`)));
  const tabs = make("div", { class: "tabs", role: "group", "aria-label": "Target examples" });
  const body = make("div");
  const choose = (chosen) => {
    const [number, influence] = detail.targets[chosen];
    const target = head.targets[number];
    [...tabs.children].forEach((tab, place) => tab.setAttribute("aria-pressed", place === chosen));
    body.replaceChildren(make("p", { class: "hint" }, `${target.subtask}, influence on this example ${signed(influence)}`),
      toolsOf(target), ...target.messages.map(turnOf), message("assistant", target.prefix + target.completion));
  };
  detail.targets.forEach(([, influence], place) =>
    tabs.append(make("button", { type: "button", on: { click: () => choose(place) } }, signed(influence))));
  section.append(tabs, body);
  choose(0);
  return section;
}

function bars(entries) {
  const values = entries.map(({ value }) => value ?? 0);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const span = high - low || 1;
  const zero = (-100 * low) / span;
  return make("div", { class: "bars" }, ...entries.flatMap(({ name, value, own }) => {
    const fill = make("span", { class: value < 0 ? "fill negative" : "fill" });
    fill.style.left = `${value < 0 ? zero + (100 * value) / span : zero}%`;
    fill.style.width = `${(100 * Math.abs(value ?? 0)) / span}%`;
    const mark = make("span", { class: "zero" });
    mark.style.left = `${zero}%`;
    return [make("span", { class: own ? "name own" : "name" }, name),
      make("span", { class: "track", "aria-hidden": "true" }, fill, mark), make("span", { class: "value" }, signed(value))];
  }));
}

function scoreSplit(row, detail) {
  const own = columns.subtask[row];
  const subtasks = head.subtasks.map((name, place) => ({ name, value: detail.subtasks[place], own: name === own }));
  subtasks.sort((a, b) => (b.value ?? -9) - (a.value ?? -9));
  const some = subtasks.length > 14 ? [...subtasks.slice(0, 8), ...subtasks.slice(-4)] : subtasks;
  const section = make("section", {}, make("h3", {}, head.exact ? "Score by subtask (exact where it was rescored)" : "Score by subtask"), bars(some));
  const cut = head.cuts[own];
  if (cut !== undefined && columns.group[row] !== "most_negative") {
    const above = columns.score[row] - cut;
    const side = above >= 0 ? "above" : "below";
    section.append(make("p", { class: "hint" }, `${number(Math.abs(above))} ${side} the cut of ${own}, ${signed(cut)}.`));
  }
  const turn = turnOfRow(row);
  if (turn) section.append(make("p", { class: "hint", id: "turn" }, turn));
  if (detail.chance !== null)
    section.append(make("p", { class: "hint" }, `Exact scores would select it with a chance of ${percent(detail.chance)}.`));
  if (some.length < subtasks.length)
    section.append(make("p", { class: "hint" }, `The best 8 and the worst 4 of ${subtasks.length} subtasks.`));
  section.append(make("h3", { class: "next" }, `By checkpoint, on ${own}`), bars(head.checkpoints.map(({ name, weight }, place) => ({
    name: `${name} (weight ${percent(weight)})`, value: detail.checkpoints[place],
  }))));
  return section;
}

/** Which turn a selected row was taken in, and why the next rank may score higher; empty where nobody takes turns. */
function turnOfRow(row) {
  if (head.turns.length < 2 || columns.group[row] !== "selected") return "";
  const own = columns.subtask[row];
  const selected = columns.id.map((_, other) => other).filter((other) => columns.group[other] === "selected");
  const before = selected.filter((other) => columns.subtask[other] === own && columns.rank[other] <= columns.rank[row]);
  const next = selected.find((other) => columns.rank[other] === columns.rank[row] + 1);
  const higher = next !== undefined && columns.score[next] > columns.score[row]
    ? ` Rank ${whole.format(columns.rank[next])} scores higher, ${signed(columns.score[next])}: it was taken for ${columns.subtask[next]}, in the next turn.` : "";
  return `Taken in a turn of ${own}, as number ${whole.format(before.length)} of its rows.${higher}`;
}

function nearRows(detail) {
  const items = detail.near.map((near) => {
    const title = make("div", { class: "head" }, make("span", {},
      `cosine ${near.cosine.toFixed(3)}`, near.cosine >= head.near_duplicate ? make("span", { class: "tag warn" }, "near-duplicate") : null,
      make("span", { class: "tag" }, near.place === null ? "not on this page" : GROUPS[columns.group[near.place]][0].toLowerCase())));
    const text = make("div", { class: "text", dir: "auto" });
    const show = (messages) => { text.textContent = messages.map((turn) => `${turn[0]}: ${fullText(turn)}`).join("\n"); };
    if (near.messages) show(near.messages);
    else if (near.place !== null) {
      detailOf(near.place).then(({ messages }) => show(messages));
      title.append(make("button", { type: "button", on: { click: () => open(near.place) } }, "Open"));
    }
    return make("li", {}, title, text, make("code", {}, near.id));
  });
  return make("section", {}, make("h3", {}, "Nearest rows of the pool, by gradient"), make("ul", { class: "near" }, ...items));
}

function origin(row, detail) {
  const facts = [
    ["id", columns.id[row]],
    ["source", columns.source[row]],
    ["file", `${detail.file}:${detail.line}`],
    ["shard, row", `${detail.shard}, ${detail.row}`],
    ["copies in the pool", whole.format(detail.copies)],
    ["loss tokens", columns.tokens[row] === null ? "–" : whole.format(columns.tokens[row])],
    ["assistant turns", whole.format(columns.turns[row])],
    ...(detail.losses ? [["loss before and after training on the targets", detail.losses.map((loss) => loss.toPrecision(4)).join(" → ")]] : []),
    ["selected by others", detail.also.map((place) => head.overlap[place].recipe).join(", ") || "none"],
    ["on the command line", `less-assets explain ${head.task} ${columns.id[row]}`],
    ["its whole lineage", `less-assets trace ${columns.id[row]}`],
  ];
  return make("section", {}, make("h3", {}, "Where it comes from"),
    make("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, make("code", {}, value))])));
}

function buildDialog() {
  const dialog = byId("detail");
  const step = (by) => {
    const place = shown.indexOf(opened) + by;
    if (place >= 0 && place < shown.length) { focused = place; open(shown[place]); }
  };
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=checkbox])") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    opened = null;
    history.replaceState(null, "", "#rows");
    focusLine(focused);
  });
}
