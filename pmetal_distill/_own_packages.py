"""Our packages `schemas` and `pipeline` beside files of the same names in a script's folder. Costs a stat.

Python looks in the folder of a script first, so a user's own `schemas.py` would be taken for our package.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_HOME = Path(__file__).resolve().parent.parent


def claim(name: str) -> None:
    """Sees that `import name` means the package that was installed with this one.

    Raises:
        ImportError: another module of that name is in use already.
    """
    ours = _HOME / name / "__init__.py"
    if not ours.is_file():
        return  # installed in another place: the ordinary search finds it
    if (imported := sys.modules.get(name)) is not None:
        _require_ours(imported, ours, name)
        return
    spec = importlib.util.spec_from_file_location(name, ours, submodule_search_locations=[str(ours.parent)])
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _require_ours(module: ModuleType, ours: Path, name: str) -> None:
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != ours:
        raise ImportError(
            f"pmetal_distill: '{name}' must be the package that comes with it, found {file or repr(module)} "
            "imported under that name; rename that file, or import pmetal_distill before it"
        )
