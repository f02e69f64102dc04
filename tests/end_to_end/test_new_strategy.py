"""The worked example of CONTRIBUTING.md: a strategy is one function and one entry, and everything else knows it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from support.tiny import TinyProject

ROOT = Path(__file__).parents[2]
FUNCTION, ENTRY = (
    re.compile(rf"^```python {kind}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for kind in (r"file=less_assets/method/selection/longest\.py", "file=entry")
)
SCRIPT = """
import json
import sys
import types

import dagster as dg

from less_assets.project.strategies import STRATEGIES, Strategy

path, source, entry = sys.argv[1:]
module = types.ModuleType("less_assets.method.selection.longest")
exec(source, module.__dict__)
sys.modules[module.__name__] = module
strategy = eval(entry)
STRATEGIES[strategy.name] = strategy

from support.graph import run  # after the entry, as if it stood in the table

from less_assets.project.project import load_project
from less_assets.project.reference_page import describe_project_file
from less_assets.reading.files import SUBSET
from less_assets.running.runner import Request
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

with dg.DagsterInstance.ephemeral() as instance:
    made = run(path, instance, Request(tasks=("sums",), until="selected_subset")).materialized
project = load_project(path)
subset = read_parquet(open_lineage(project, open_store(project)).folder("selected_subset", "longest|sums"), SUBSET)
print(json.dumps({
    "made": sorted(made),
    "scores": subset["score"].to_list(),
    "texts": [" ".join(m["content"] for m in messages) for messages in subset["messages"]],
    "documented": "`longest`: the longest rows" in describe_project_file(),
}))
"""


def test_a_rule_of_one_function_and_one_entry_selects_rows(tmp_path, tiny_model):
    project = TinyProject(tmp_path, tiny_model)
    project.settings["recipes"] = [{"name": "longest", "strategy": "longest", "fraction": 0.2}]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = [block for kind in (FUNCTION, ENTRY) for block in kind.findall(page)]
    assert len(blocks) == 2
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(project.path), *blocks],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    lengths = list(map(len, told["texts"]))
    assert len(lengths) == 8
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert told["scores"][0] == 1.0
    assert "text_scores" in told["made"]
    assert not {"influence_scores", "pool_embeddings"} & set(told["made"])
    assert told["documented"]
