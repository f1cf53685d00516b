"""The packages have no way to turn a file into running code: read from their syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "pmetal_distill", "schemas")
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "runpy",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "os.system", "os.popen", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "pd.read_pickle", "pandas.read_pickle", "pa.deserialize", "pa.PyExtensionType", "pyarrow.PyExtensionType",
    "np.fromregex", "sys.modules",
}  # fmt: skip
SAFE_LOADERS = {"_Loader", "SafeLoader", "CSafeLoader"}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dangers(text: str) -> Iterator[str]:
    """Lines that could execute what a file holds."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        else:
            names = []
        yield from (f"{node.lineno}: import {name}" for name in names if name in MODULES)
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {found}" for found in call(node))


def call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in BUILTINS or name in METHODS:
        yield name
    if name in ("np.load", "numpy.load", "np.genfromtxt") and options.get("allow_pickle") != "False":
        yield f"{name} without allow_pickle=False"
    if name == "yaml.load" or (name == "yaml.dump" and "Dumper" not in options):
        loader = options.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        if loader.rpartition(".")[2] not in SAFE_LOADERS:
            yield name
    if options.get("shell", "False") != "False":
        yield f"{name} with a shell"


def test_no_file_is_executed_or_unpickled() -> None:
    files = sources()
    assert len(files) > 100
    found = [f"{path}:{danger}" for path in files for danger in dangers(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import torch.serialization", "eval(x)", "exec(x)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "yaml.load(x, yaml.Loader)", "yaml.load(x)",
        "yaml.unsafe_load(x)",         "subprocess.run(x, shell=True)", "os.system(x)", "__import__(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert list(dangers(line))


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from pmetal_distill import yaml_files

    assert issubclass(yaml_files._Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml_files._Loader("!!python/object/apply:os.system [echo]").get_single_data()
