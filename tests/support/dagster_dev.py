"""A running `less-assets dev`, asked over GraphQL as the UI asks it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

READY_SECONDS = 300
RUN_SECONDS = 600
BACKFILL_SECONDS = 600
"""Dagster's daemon looks at backfills every 30 s; the rest is for a busy machine."""

LOCATION = """{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus
  locationOrLoadError { ... on PythonError { message } } } } } }"""
LAUNCH = """mutation($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
BACKFILL = "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"
MATERIALIZATIONS = """query($key: AssetKeyInput!, $partitions: [String!]) { assetOrError(assetKey: $key) {
  ... on Asset { assetMaterializations(partitions: $partitions, limit: 20) { partition tags { key value }
    metadataEntries { label ... on IntMetadataEntry { intValue } ... on TextMetadataEntry { text }
    ... on TableMetadataEntry { table { records } } ... on MarkdownMetadataEntry { mdStr } } } } } }"""
STALE = """query($keys: [AssetKeyInput!]!, $partition: String) { assetNodes(assetKeys: $keys) {
  assetKey { path } staleStatus(partition: $partition) staleCauses(partition: $partition) { reason } } }"""


class DagsterDev:
    """A server of its own: ports of the UI and of the reports, DAGSTER_HOME and process group."""

    def __init__(self, project_file: Path, home: Path) -> None:
        with socket.socket() as ui, socket.socket() as reports:
            for free in (ui, reports):
                free.bind(("127.0.0.1", 0))
            self.port, self.reports_port = ui.getsockname()[1], reports.getsockname()[1]
        self.project_file, self.home = project_file, home
        self._log = (home / "server.log").open("wb")
        command = [sys.executable, "-m", "less_assets.cli", "dev"]
        self._process = subprocess.Popen(
            [*command, "-p", str(project_file), "--port", str(self.port), "--reports-port", str(self.reports_port)],
            cwd=home,
            env={**os.environ, "DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def log(self) -> str:
        """What the server has printed."""
        return (self.home / "server.log").read_text(errors="replace")

    def query(self, query: str, **variables: Any) -> dict[str, Any]:
        """Data of a GraphQL answer; errors fail the test."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[-3000:]) from error
        assert "errors" not in found, found["errors"]
        return found["data"]

    def wait_until_loaded(self) -> dict[str, Any]:
        """The code location's entry once the server answers."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log()
            try:
                entries = self.query(LOCATION)["workspaceOrError"].get("locationEntries", [])
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                entries = []
            if entries and entries[0]["loadStatus"] == "LOADED":
                return entries[0]
            time.sleep(0.3)
        raise AssertionError(f"the server did not come up:\n{self.log()[-3000:]}")

    def launch(self, assets: list[str], *partitions: str) -> str:
        """Launch one run over a partition, or over the range between two; returns its id."""
        names = ["dagster/asset_partition_range_start", "dagster/asset_partition_range_end"]
        tags = dict(zip(names if len(partitions) == 2 else ["dagster/partition"], partitions, strict=False))
        params = {
            "selector": {
                "repositoryLocationName": "less_assets",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": [asset]} for asset in assets],
                "assetCheckSelection": None,
            },
            "mode": "default",
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        launched = self.query(LAUNCH, params=params)["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def outcome(self, run: str) -> str:
        """Status of a launched run once it has ended."""
        deadline = time.monotonic() + RUN_SECONDS
        while (found := self.query(RUN, id=run)["runOrError"]["status"]) not in ("SUCCESS", "FAILURE", "CANCELED"):
            assert time.monotonic() < deadline, f"still {found}:\n{self.log()[-3000:]}"
            time.sleep(0.3)
        return found

    def backfill_outcome(self, backfill: str) -> str:
        """Status of a backfill once it has ended."""
        deadline = time.monotonic() + BACKFILL_SECONDS
        unfinished = ("REQUESTED", "CANCELING", "FAILING")
        while (found := self.query(BACKFILL, id=backfill)["partitionBackfillOrError"]["status"]) in unfinished:
            assert time.monotonic() < deadline, f"still {found}:\n{self.log()[-3000:]}"
            time.sleep(1)
        return found

    def materializations(self, asset: str, *partitions: str) -> dict[str | None, dict[str, Any]]:
        """Latest materialization of each partition: its metadata by label and its data version as `version`."""
        found = self.query(MATERIALIZATIONS, key={"path": [asset]}, partitions=list(partitions) or None)
        latest: dict[str | None, dict[str, Any]] = {}
        for event in found["assetOrError"].get("assetMaterializations", []):
            shown = {entry.pop("label"): next(iter(entry.values()), None) for entry in event["metadataEntries"]}
            tags = {tag["key"]: tag["value"] for tag in event["tags"]}
            latest.setdefault(event["partition"], {**shown, "version": tags["dagster/data_version"]})
        return latest

    def stale_status(self, asset: str, partition: str | None = None) -> str:
        """What the UI says of a partition: FRESH, STALE or MISSING."""
        (node,) = self.query(STALE, keys=[{"path": [asset]}], partition=partition)["assetNodes"]
        return node["staleStatus"]

    def stop(self) -> int:
        """End it as Ctrl-C does; kill its process group only if that does not help."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()
        finally:
            self._log.close()
