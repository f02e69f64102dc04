// The page of a selection begins: after all other scripts, of which it is one with them.

async function start() {
  const first = await unpack(byId("head"));
  head = first.head;
  columns = first.columns;
  count = columns.id.length;
  perPackage = head.rows_of_a_package;
  document.body.classList.toggle("scored-not", !head.scored);
  buildOverview();
  buildControls();
  buildDialog();
  buildMarks();
  buildComparison();
  if (packages.length) await detailOf(0); // what the first lines say
  refresh();
  for (const [event, now] of [["beforeprint", true], ["afterprint", false]])
    window.addEventListener(event, () => { printing = now; drawLines(true); });
  document.documentElement.dataset.ready = "yes";
  const wanted = columns.id.indexOf(location.hash.replace("#row=", ""));
  if (wanted >= 0) { state.group = columns.group[wanted]; refresh(); focused = shown.indexOf(wanted); open(wanted); }
  await unpackAll();
}

start().catch((error) => {
  byId("trouble").hidden = false;
  byId("trouble").textContent = `The page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
