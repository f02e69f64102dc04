"""The page of a real run in a real browser: it works, it is legible, and nothing in a row's text ever runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import HOSTILE

from less_assets.method.data.excluded_rows import read_excluded
from less_assets.project.project import load_project
from less_assets.reading.files import REPORT, SUBSET
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")

PATIENCE = 120_000
"""Milliseconds; a busy machine is slow."""

CONTRAST = """selector => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  return [...document.querySelectorAll(selector)].slice(0, 6).map(element => {
    let ground = element;
    while (ground && (parse(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
    const [one, two] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
      .map(color => light(parse(color)));
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  });
}"""


def page_file(project_file: Path, recipe: str) -> Path:
    project = load_project(project_file)
    lineage = open_lineage(project, open_store(project))
    return Path(str(lineage.folder("selection_report", f"{recipe}|sums").path(REPORT)))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        sync_api.expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, explained_project):
    """Open a recipe's page; at the end, nothing was complained about and nothing was asked for but the file."""
    contexts, trouble, requests = [], [], []

    def opened(recipe: str = "less", **settings):
        context = browser.new_context(**settings)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file(explained_project, recipe).as_uri())
        page.wait_for_selector("html[data-unpacked]")
        return page

    yield opened
    hacked = [page.evaluate("window.hacked") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert not any(hacked)
    assert trouble == []
    assert [url for url in requests if not url.endswith(REPORT)] == []
    assert len(requests) == len(contexts)


def prompts(page) -> list[str]:
    return page.locator(".body .line .prompt").all_inner_texts()


def test_it_says_what_was_selected(open_page):
    page = open_page()
    assert page.title() == "less for sums · tiny"
    assert page.locator("h1").inner_text() == "What less selected for sums"
    assert "48 (100 %)" in page.locator("#figures").inner_text()
    assert page.locator("#count").inner_text() == "48 rows"
    assert page.locator("#overlap-rows tr").count() == 2
    assert page.locator("#cut svg").first.is_visible()
    assert "pool_index" in page.locator("#inputs").text_content()


def test_search_looks_into_whole_conversations(open_page):
    page = open_page()
    page.fill("#search", "javascript:")
    sync_api.expect(page.locator("#count")).to_contain_text("1 of")
    assert prompts(page) == ["what is address ?"]
    page.fill("#search", "no such words")
    page.wait_for_selector(".empty")
    page.click("#clear")
    assert page.locator("#count").inner_text() == "48 rows"


def test_a_row_shows_its_answer_and_what_a_search_found(open_page):
    page = open_page()
    line = page.locator(".body .line").first
    row = page.evaluate("details[shown[0]].messages.map(([, text]) => text)")
    assert line.locator(".prompt").inner_text() == row[0]
    assert line.locator(".second").inner_text() == row[-1]
    page.fill("#search", "javascript:")
    sync_api.expect(page.locator("#count")).to_contain_text("1 of")
    assert page.locator(".body mark").all_inner_texts() == ["javascript:"]
    page.evaluate("details[shown[0]].messages.splice(1, 0, ['user', `${'x '.repeat(400)}hidden words`])")
    page.evaluate("words[shown[0]] += ' hidden words'")
    page.fill("#search", "javascript: hidden")
    sync_api.expect(page.locator(".body mark").last).to_have_text("hidden")
    assert page.locator(".body .second").inner_text().startswith("…"), "the place where it stands"


def test_ids_of_the_rows_in_the_list_are_copied(open_page):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.select_option("#filters select[data-column=source]", "colors")
    page.click("#copy")
    sync_api.expect(page.locator("#count")).to_contain_text("copied")
    copied = page.evaluate("navigator.clipboard.readText()").split()
    assert copied == page.evaluate("shown.map(row => columns.id[row])")
    assert 0 < len(copied) < 48


def test_the_rows_in_the_list_are_saved_as_json_lines(open_page, explained_project):
    page = open_page()
    page.select_option("#filters select[data-column=source]", "colors")
    with page.expect_download() as download:
        page.click("#download")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert download.value.suggested_filename == "tiny-less-sums-rows.jsonl"
    assert [row["example_id"] for row in rows] == page.evaluate("shown.map(row => columns.id[row])")
    assert 0 < len(rows) < 48
    assert {row["source"] for row in rows} == {"colors"}
    (stored,) = page_file(explained_project, "less").parents[3].glob("recipes/less/*/subset.jsonl")
    by_id = {row["example_id"]: row for row in map(json.loads, stored.read_text().splitlines())}
    assert all(row["messages"] == by_id[row["example_id"]]["messages"] for row in rows)


def test_marked_rows_are_copied_as_a_file_and_stay_marked(open_page, tmp_path):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".body .line").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("x")
    sync_api.expect(page.locator("#reason")).to_be_focused()
    page.keyboard.type('wrong "answer" <b>')
    page.keyboard.press("ArrowLeft")
    assert page.locator("#detail-title").inner_text() == "Rank 2", "arrow keys move in the field"
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(".body .line").nth(1).locator(".tag.out")).to_have_count(1)
    page.select_option("#filters select[data-column=source]", "plus")
    page.fill("#search", "javascript:")
    sync_api.expect(page.locator("#count")).to_contain_text("1 of")
    page.click("#mark-all")
    page.keyboard.type("no answer")
    page.keyboard.press("Enter")
    assert page.locator("#mark-count").inner_text() == "2 rows marked."
    page.click("#marks-copy")
    sync_api.expect(page.locator("#mark-count")).to_contain_text("Copied")
    file = tmp_path / "left-out.jsonl"
    file.write_text(page.evaluate("navigator.clipboard.readText()"))
    ids = page.evaluate("[columns.id[1], columns.id[shown[0]]]")
    assert read_excluded([str(file)]) == {ids[0]: 'wrong "answer" <b>', ids[1]: "no answer"}
    with page.expect_download() as download:
        page.click("#marks-save")
    assert Path(download.value.path()).read_text() == file.read_text()
    page.evaluate("marks.clear(); readMarks()")
    assert page.evaluate("marks.size") == 2, "the browser keeps them"
    page.evaluate("head.excluded = [[[...marks.keys()][0], 'done']]; marks.clear(); readMarks()")
    assert page.evaluate("[...marks.keys()]") == [ids[1]], "what is left out already is marked no more"
    page.evaluate("drawMarks()")
    page.click("#mark-rows button[aria-label^=Keep]")
    assert page.locator("#mark-count").inner_text() == "No row is marked."


def test_two_recipes_stand_side_by_side(open_page, explained_project):
    page = open_page("random-seed0")
    page.select_option("#compared-with", label="few")
    sync_api.expect(page.locator("#only-there li").first).to_be_visible()
    lineage = open_lineage(load_project(explained_project), open_store(load_project(explained_project)))
    mine, theirs = (
        read_parquet(lineage.folder("selected_subset", f"{recipe}|sums"), SUBSET).sort("rank")["example_id"].to_list()
        for recipe in ("random-seed0", "few")
    )
    alone = [name for name in theirs if name not in mine]
    links = page.locator("#only-there a").evaluate_all("links => links.map(link => link.href.split('#row=')[1])")
    assert links == alone
    assert page.locator("#only-here-title").inner_text() == f"Only random-seed0: {len(set(mine) - set(theirs))}"
    assert page.locator("#only-here li").count() == len(set(mine) - set(theirs))
    counts = page.locator("#by-source td").all_inner_texts()
    assert sum(map(int, counts)) == len({*mine, *theirs})
    page.select_option("#without", label="few")
    assert page.evaluate("shown.map(row => columns.id[row])") == [name for name in mine if name not in theirs]


def test_links_lead_to_the_other_page_and_its_row(browser, explained_project):
    context = browser.new_context()
    page = context.new_page()
    page.goto(page_file(explained_project, "random-seed0").as_uri())
    page.wait_for_selector("html[data-unpacked]")
    page.select_option("#compared-with", label="less")
    link = page.locator("#only-there a").first
    wanted = link.get_attribute("href").partition("#row=")[2]
    link.click()
    page.wait_for_selector("html[data-unpacked]")
    assert page.url.startswith(page_file(explained_project, "less").as_uri())
    assert page.locator("h1").inner_text() == "What less selected for sums"
    assert page.evaluate("columns.id[opened]") == wanted
    context.close()


def test_paper_shows_all_rows_in_light(open_page):
    page = open_page(color_scheme="dark")
    assert page.locator(".body .line").count() < 48
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert len(prompts(page)) == 48
    ranks = page.locator(".body .line > :first-child").all_inner_texts()
    assert ranks == [str(rank) for rank in range(1, 49)]
    tops = page.locator(".body .line").evaluate_all("lines => lines.map(line => line.getBoundingClientRect().top)")
    assert tops == sorted(set(tops)), "one below the other"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for selector in ("h1", ".hint", ".second", ".notes li"):
        assert min(page.evaluate(CONTRAST, selector)) >= 4.5
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.locator(".body .line").count() < 48


def test_it_says_why_a_rank_can_score_below_the_next(open_page):
    page = open_page()
    assert "part-0, then one for part-1" in page.locator("#turns").inner_text()
    rank = page.evaluate("columns.score.findIndex((score, row) => score < columns.score[row + 1]) + 1")
    assert rank >= 1, "else nothing is to be explained"
    page.locator(f".body .line[data-index='{rank - 1}']").click()
    page.wait_for_selector("#turn")
    assert f"Rank {rank + 1} scores higher" in page.locator("#turn").inner_text()
    other = open_page("few")
    assert not other.locator("#turns").is_visible(), "one ranking: nobody takes turns"


def test_certain_and_borderline_rows_are_told_apart(open_page):
    page = open_page("few")
    certain = page.evaluate("columns.certain.filter(each => each !== null)")
    assert f"certain rows; the others are borderline\n{sum(certain)}" in page.locator("#figures").inner_text()
    assert "exact scores would select" in page.locator("#cut").inner_text()
    page.locator(".body .line").first.click()
    page.wait_for_selector("#detail-body section")
    assert page.locator("#badges .tag").nth(1).inner_text() == ("certain" if certain[0] else "borderline")


def test_the_lines_of_rows_that_are_not_unpacked_yet_fill_in_later(open_page):
    page = open_page()
    page.evaluate("""() => {
      const late = shown[0];
      window.kept = { preview: previews[late], detail: details[late] };
      delete previews[late];
      unpacking.set(Math.floor(late / perPackage), new Promise(done => window.unpack = () => {
        previews[late] = window.kept.preview; done();
      }));
      refresh();
    }""")
    assert page.locator(".body .line").first.locator(".prompt").count() == 0
    page.evaluate("window.unpack()")
    sync_api.expect(page.locator(".body .line").first.locator(".prompt")).to_have_count(1)


def test_rows_are_sorted_and_filtered(open_page):
    page = open_page()
    page.click("#headings [data-column=score] button")
    assert page.locator("#headings [data-column=score]").get_attribute("aria-sort") == "descending"
    scores = [float(text.replace("−", "-")) for text in page.locator(".body .line > :nth-child(2)").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.select_option("#filters select[data-column=source]", "colors")
    first = page.locator("#count").inner_text()
    assert " of 48 rows" in first
    page.click("#clear")
    page.click(".facet button[data-column=source][data-value=colors]")
    assert page.locator("#count").inner_text() == first, "a line of the composition is a filter"


def test_rows_below_the_cut_have_a_list_of_their_own(open_page):
    page = open_page("few")
    page.click("#groups [data-group=below_cut]")
    assert page.locator("#count").inner_text() == "4 rows"
    page.locator(".body .line").first.click()
    page.wait_for_selector("#detail-body section")
    assert page.locator("#detail-title").inner_text() == "Below the cut, rank 6"
    assert page.locator(".token").count() > 0


def test_an_open_row_shows_heat_targets_and_neighbours(open_page):
    page = open_page()
    page.locator(".body .line").first.click()
    page.wait_for_selector("#detail-body section")
    assert page.locator("#detail-title").inner_text() == "Rank 1"
    heat = page.locator(".token")
    assert heat.count() >= 2
    assert page.locator(".token.p4, .token.n4").count() >= 1, "the strongest token has the strongest tint"
    assert "exact influence" in page.locator(".legend").inner_text()
    page.uncheck("#heat")
    assert heat.count() == 0
    assert page.locator(".near li").count() == 3
    assert page.locator(".bars").count() == 2
    targets = page.locator("#detail section").nth(1)
    before = targets.inner_text()
    targets.locator("button").nth(1).click()
    assert targets.inner_text() != before
    assert (
        "data/plus.jsonl:" in page.locator(".facts").inner_text()
        or "data/colors" in page.locator(".facts").inner_text()
    )


def test_it_is_worked_by_keyboard_alone(open_page):
    page = open_page()
    page.locator(".body .line").first.focus()
    for key in ("End", "Home", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#detail-title").inner_text() == "Rank 3"
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#detail-title")).to_have_text("Rank 4")
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    sync_api.expect(page.locator(".body .line[data-index='3']")).to_be_focused()


def test_tab_reaches_every_control_in_order_and_leaves_the_page(open_page):
    page = open_page("few")
    page.select_option("#compared-with", label="random-seed0")
    page.wait_for_selector("#only-there li")
    page.evaluate("mark([0], 'x'); document.activeElement.blur(); scrollTo(0, 0)")
    controls = """[...document.querySelectorAll('a, button, input, select, summary, [tabindex="0"]')]
      .filter(element => element.checkVisibility() && !element.disabled && !element.closest('dialog'))"""
    wanted = page.evaluate(
        f"({controls}).map((element, place) => {{ element.dataset.stop = place; return String(place); }})"
    )
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.stop"))
    assert reached == wanted
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === document.body"), "nothing holds the keyboard"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_text(open_page, name):
    page = open_page()
    page.fill("#search", f"what is {name} ?")
    sync_api.expect(page.locator("#count")).to_contain_text("of 48")
    page.locator(".body .line", has_text=f"what is {name} ?").click()
    page.wait_for_selector("#detail-body section")
    page.uncheck("#heat")
    said = page.locator("#detail-body .message.assistant .text").first
    assert said.text_content() == HOSTILE[name]
    assert page.locator("img, iframe").count() == 0
    links = page.locator("a:not(.skip)").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert all(link.startswith("../../../../sums/reports/") for link in links), "no address is made of a row"
    assert page.locator("script:not([type])").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.fill("#search", "what is")
    page.wait_for_selector(".body mark")
    looked_at = [
        "h1",
        ".hint",
        ".settings dt",
        ".notes li",
        ".facet button",
        ".headings button",
        ".line > *",
        ".second",
        "mark",
    ]
    looked_at += ["#groups button", ".figures dt", ".plain th", ".tag", "figcaption", "#turns", "#overlap-rows a"]
    page.select_option("#compared-with", label="few")
    page.evaluate("mark(shown, 'why')")
    page.wait_for_selector("#only-here li")
    looked_at += [".sides .rank", ".sides .second", "#only-there-title a", ".tag.out", "#mark-rows td", "#mark-count"]
    looked_at += ["#copy", "#marks-copy", "#mark-rows button", ".reason label", ".reason button", "#reason", "#turn"]
    page.locator(".body .line").first.click()
    page.wait_for_selector("#detail-body section")
    looked_at += [".token", ".legend", ".message .role", ".facts dt", ".tokens li", ".bars .value", ".waiting, h3"]
    ratios = {selector: page.evaluate(CONTRAST, selector) for selector in looked_at}
    assert all(ratios.values()), "a selector that finds nothing measures nothing"
    assert {selector: found for selector, found in ratios.items() if found and min(found) < 4.5} == {}
    page.evaluate("""() => { for (const step of ['p1','p2','p3','p4','n1','n2','n3','n4'])
        document.querySelector('.message .text').append(Object.assign(document.createElement('span'),
        { className: `tint token ${step}`, textContent: step })); }""")
    tints = page.evaluate(CONTRAST.replace("slice(0, 6)", "slice(0, 8)"), ".tint")
    assert len(tints) == 8
    assert min(tints) >= 4.5


def test_a_recipe_without_scores_and_a_narrow_window(open_page):
    page = open_page("random-seed0", viewport={"width": 390, "height": 800})
    assert page.locator("#count").inner_text() == "10 rows"
    assert not page.locator("#cut").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"
    page.locator(".body .line").first.click()
    page.wait_for_selector("#detail-body section")
    assert page.locator("#detail .near").count() == 0


def test_a_rescored_recipe_shows_exact_scores(open_page):
    page = open_page("few")
    assert "exact influence of 20 candidates" in page.locator("figcaption").inner_text().lower()
    assert "rescored" in page.locator("#settings").inner_text()


def test_a_link_opens_its_row(open_page, explained_project):
    page = open_page()
    page.locator(".body .line").nth(2).click()
    page.wait_for_selector("#detail-body section")
    row = page.evaluate("location.hash")
    other = page.context.new_page()
    other.goto(page_file(explained_project, "less").as_uri() + row)
    other.wait_for_selector("#detail-body section")
    assert other.locator("#detail-title").inner_text() == "Rank 3"
    other.close()


def test_thoughts_calls_tools_and_masked_turns_are_shown_and_found(open_page):
    page = open_page()
    turns = [
        ["user", "2 + 2?"],
        [
            "assistant",
            "",
            {"masked": True, "reasoning": "two and two", "calls": [{"name": "add", "arguments": {"a": 2}}]},
        ],
        ["tool", "4", {"name": "add"}],
        ["assistant", "Four."],
    ]
    page.evaluate(
        "([turns, tools]) => Object.assign(details[shown[0]], {messages: turns, tools, heat: null})", [turns, "[1]"]
    )
    page.locator(".body .line").first.click()
    roles = page.locator("#detail-body section").first.locator(".role").all_inner_texts()
    assert roles == ["user", "assistant no loss", "tool add", "assistant"]
    row = page.locator("#detail-body section").first
    assert row.locator(".thought").inner_text() == "two and two"
    assert row.locator(".message .call").last.inner_text() == 'add({"a":2})'
    assert row.locator("summary").inner_text() == "Tools"
