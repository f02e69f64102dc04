"""Dagster's UI worked with clicks, as the README says: from a backfill of one task to why a row was chosen."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.dagster_dev import DagsterDev

from less_assets.project.project import load_project
from less_assets.reading.files import SUBSET
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE = 200_000
"""Milliseconds: Dagster's daemon looks at backfills every 30 s, and a busy machine is no failure."""
sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")


@pytest.fixture
def dev(explained_project) -> Iterator[DagsterDev]:
    """A server over a copy of what a run has stored, of which Dagster's records know nothing yet; and a second task."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="less-ui-", dir=memory if memory.is_dir() else None))
    # Beside the original: the path from the project to its model is part of what artifacts were made from.
    project_file = Path(tempfile.mkdtemp(dir=explained_project.parent.parent)) / "project.yaml"
    shutil.copytree(explained_project.parent, project_file.parent, dirs_exist_ok=True)
    settings = yaml.safe_load(project_file.read_text())
    settings["tasks"].append({"name": "sky", "examples": {"path": "targets/sky.jsonl"}})
    settings["recipes"] = [recipe for recipe in settings["recipes"] if recipe["name"] != "few"]
    project_file.write_text(yaml.safe_dump(settings))
    (root / "home").mkdir()
    server = DagsterDev(project_file, root / "home")
    try:
        server.wait_until_loaded()
        yield server
    finally:
        server.stop()
        for folder in (root, project_file.parent):  # a run that was cancelled may still be writing its last words
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def page(dev) -> Iterator:
    """A browser at the UI."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(base_url=f"http://127.0.0.1:{dev.port}", viewport={"width": 1500, "height": 1000})
        context.set_default_timeout(PATIENCE)
        yield context.new_page()
        browser.close()


def launch_backfill_of(page, task: str) -> str:
    """From an asset's page: all recipes of a task; returns the backfill's id."""
    page.get_by_role("button", name="Materialize").first.click()
    confirm = page.get_by_role("button", name="Confirm")  # asked where nothing upstream is recorded
    choice = page.get_by_text("Select a partition")
    sync_api.expect(confirm.or_(choice).first).to_be_visible(timeout=PATIENCE)
    if confirm.is_visible():
        confirm.click()
    choice.click()
    page.get_by_placeholder("Filter partitions").fill(f"|{task}")
    page.get_by_text("Select all (2)").click()
    page.get_by_text("Launch runs to materialize").click()  # the list closes
    with page.expect_response(lambda answer: "launchPartitionBackfill" in (answer.request.post_data or "")) as answer:
        page.get_by_role("button", name="Launch backfill").click()
    return answer.value.json()["data"]["launchPartitionBackfill"]["backfillId"]


def choose(page, action: str) -> None:
    """An entry of the menu on a backfill's page."""
    page.get_by_label("expand_more").last.click()
    page.get_by_text(action, exact=True).first.click()


def test_from_a_backfill_of_one_task_to_why_its_best_row_was_chosen(page, dev):
    page.goto("/assets/selected_subset")
    first = launch_backfill_of(page, "sums")

    page.goto(f"/runs/b/{first}")
    choose(page, "Cancel backfill")
    page.get_by_role("button", name="Cancel backfill").click()
    sync_api.expect(page.get_by_text("Canceled", exact=True).first).to_be_visible(timeout=PATIENCE)
    with page.expect_response(lambda answer: "reexecutePartitionBackfill" in (answer.request.post_data or "")) as again:
        choose(page, "Re-execute from failure")
    second = again.value.json()["data"]["reexecutePartitionBackfill"]["backfillId"]
    assert second != first
    assert dev.backfill_outcome(second) == "COMPLETED_SUCCESS"
    made = dev.materializations("selected_subset")
    assert set(made) == {"less|sums", "random-seed0|sums"}, "the other task was not asked for"

    page.goto("/assets/selected_subset?view=partitions")
    page.get_by_text("less|sums", exact=True).first.click()
    link = page.locator("a[href*='/reports/less/'][href*='#row=']").first
    with page.context.expect_page() as opened:
        link.click()
    report = opened.value
    report.wait_for_selector("#detail-body section")
    assert report.url.startswith(f"http://127.0.0.1:{dev.reports_port}/tiny/selection/sums/reports/less/")
    assert report.locator("#detail-title").inner_text() == "Rank 1"
    project = load_project(dev.project_file)
    lineage = open_lineage(project, open_store(project))
    subset = read_parquet(lineage.folder("selected_subset", "less|sums"), SUBSET)
    assert report.evaluate("columns.id[opened]") == subset.sort("rank")["example_id"][0]

    page.goto("/assets/selected_subset")
    sync_api.expect(page.get_by_text("less-assets explain sums --recipe less").first).to_be_visible(timeout=PATIENCE)
    random = page.get_by_role("link", name="random-seed0", exact=True).first
    assert random.get_attribute("href").endswith("/selection/sums/reports/random-seed0/index.html")


def test_the_launchpad_of_the_tasks_job_names_a_task(page):
    page.goto("/locations/less_assets/jobs/bring_task_up_to_date/playground")
    sync_api.expect(page.get_by_text("task: sums").first).to_be_visible(timeout=PATIENCE)
    sync_api.expect(page.get_by_role("button", name="Launch Run")).to_be_enabled(timeout=PATIENCE)
