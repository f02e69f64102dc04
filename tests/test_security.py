"""What the code must never do, by reading it; names, addresses and secrets are tried for real."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from less_assets.errors import StorageError
from less_assets.store.artifacts import ArtifactStore

ROOT = Path(__file__).parents[1]
SOURCES = list((ROOT / "less_assets").rglob("*.py"))
# `module.function` → why it has no place here.
FORBIDDEN = {
    "pickle.load": "runs code",
    "pickle.loads": "runs code",
    "joblib.load": "runs code",
    "torch.save": "pickles",
    "numpy.load": "may unpickle",
    "np.load": "may unpickle",
    "yaml.load": "builds any object",
    "yaml.full_load": "builds objects",
    "yaml.unsafe_load": "builds any object",
    "os.system": "a shell",
    "eval": "runs code",
    "exec": "runs code",
    "subprocess.getoutput": "a shell",
    "tempfile.mktemp": "a race",
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file by the dotted name of what is called."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def options(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_unpickles_builds_objects_or_opens_a_shell(path):
    for name, call in calls(path):
        assert name not in FORBIDDEN, f"line {call.lineno}: {name} {FORBIDDEN[name]}"
        assert options(call).get("shell", "False") == "False", f"line {call.lineno}: a shell"
        if name == "torch.load":
            assert options(call).get("weights_only") == "True", f"line {call.lineno}: torch.load runs code"
        if name.endswith("Model.from_pretrained") or name.endswith("LM.from_pretrained"):
            if name.startswith("PeftModel"):
                continue
            assert "use_safetensors" in options(call) or "gguf" in ast.unparse(call) or "**options" in ast.unparse(call)
        trust = options(call).get("trust_remote_code", "False")
        assert "trust_remote_code" in trust or trust == "False", f"line {call.lineno}: {trust}"


def test_the_reading_of_calls_can_fail(tmp_path):
    (tmp_path / "bad.py").write_text("import yaml\nyaml.load(x, Loader=y)\n")
    assert [name for name, _ in calls(tmp_path / "bad.py") if name in FORBIDDEN] == ["yaml.load"]


def test_pickle_is_imported_for_its_error_alone():
    for path in SOURCES:
        text = path.read_text()
        if re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal)\b", text, re.MULTILINE):
            assert set(re.findall(r"\bpickle\.(\w+)", text)) == {"UnpicklingError"}, path


def test_yaml_is_parsed_by_a_safe_loader_only():
    for path in SOURCES:
        for base in re.findall(r"class \w+\((yaml\.\w+)\)", path.read_text()):
            assert base in ("yaml.SafeLoader", "yaml.CSafeLoader"), path


def test_leave_to_run_a_models_own_code_holds_for_that_model_alone(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from less_assets.compute.models import ModelLoader

    asked: dict[str, bool] = {}
    monkeypatch.setattr(
        "less_assets.method.training.models.load_base",
        lambda base, **options: asked.setdefault(base, options["trust_remote_code"]),
    )
    settings = {"base": "owner/model", "dtype": "auto", "device": "auto", "quantization": "none", "device_map": None}
    model = SimpleNamespace(**settings, trust_remote_code=True)
    loader = ModelLoader(SimpleNamespace(model=model), tmp_path)
    loader.base()
    loader.base("owner/another")
    assert asked == {"owner/model": True, "owner/another": False}


def test_servers_listen_on_this_machine_only():
    assert '"--host", "127.0.0.1"' in (ROOT / "less_assets/cli.py").read_text()
    text = (ROOT / "Makefile").read_text()
    assert "0.0.0.0" not in text + "".join(path.read_text() for path in SOURCES)


def test_a_password_in_the_storage_root_is_refused_and_not_repeated():
    with pytest.raises(StorageError, match="environment") as caught:
        ArtifactStore("ftp://me:hunter2@host/bucket")
    assert "hunter2" not in str(caught.value)


def test_installs_are_locked():
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    names = {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in wanted}
    assert names - pinned == set(), "name an exact version in constraints.txt"
    assert not [line for line in lines if re.search(r"[<>~]=|\*", line)], "a range is no lock"
