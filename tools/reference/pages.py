"""The two pages, put together."""

from itertools import groupby

from tools.reference import commands, facts, keys, names
from tools.reference.families import FAMILIES, family_of
from tools.reference.markdown import code, table
from tools.reference.raises import Collector, ErrorText
from tools.reference.sources import Sources

NOTICE = "<!-- Written by `python -m tools.reference` out of the code, and compared with it by a test. -->"

INTRODUCTION = """# Reference

Every command, option, key, public name, metric and variable. [reference-errors.md](reference-
errors.md) lists every error text, [troubleshooting.md](troubleshooting.md) says what to do about
them, [losses.md](losses.md) has the formulas, [choosing.md](choosing.md) what the settings cost and
buy."""

KEYS = """A file is one YAML mapping, given with `-c`. The command line beats the file, the file beats the
defaults. An unknown key is an error that suggests the right one, a key given twice an error, `1e-5`
a number. Names behind the first are other names of the same key. Every key is also an option,
`max_seq_len` as `--max-seq-len`, but for those that take mappings."""

COMPLETION = r"""After this line, at the prompt or in its start-up file, a shell completes commands, options,
choices and paths:

| shell | line |
|---|---|
| bash | `eval "$(_PMETAL_PIPELINE_COMPLETE=bash_source pmetal-pipeline)"` |
| zsh | `eval "$(_PMETAL_PIPELINE_COMPLETE=zsh_source pmetal-pipeline)"` |
| fish | `_PMETAL_PIPELINE_COMPLETE=fish_source pmetal-pipeline \| source` |

bash must be 4.4 or later; the one that comes with macOS is older, its zsh will do."""

ERRORS = """# Every error text

What the packages can raise, by what you were doing and by module;
[troubleshooting.md](troubleshooting.md) says more about each section. A message says where, what
must hold, what was found and what to do. `{name}` and `…` stand for values. `click` adds its own
messages for options that do not exist or do not parse (exit code 2)."""


def reference(sources: Sources) -> str:
    """docs/reference.md."""
    parts = [NOTICE, INTRODUCTION, "## Commands", "Every command has these options:", commands.shared()]
    parts += [
        commands.all_sections(),
        "## Completion",
        COMPLETION,
        "## Configuration files",
        KEYS,
        keys.all_sections(),
    ]
    parts += ["## Exit codes and errors", facts.exit_section()]
    parts += ["## metrics.jsonl", "One object a line in a run's folder; `val_` keys where it was evaluated."]
    parts += [facts.metrics_section(), "## Environment variables", facts.variables_section()]
    parts += ["## Python: pmetal_distill", names.library_section()]
    parts += ["## Python: schemas", names.contract_section(sources)]
    return "\n\n".join(parts) + "\n"


def errors(sources: Sources) -> str:
    """docs/reference-errors.md."""
    texts = Collector(sources).texts()
    parts = [NOTICE, ERRORS]
    for family in FAMILIES:
        parts.append(f"## {family}")
        own = [text for text in texts if family_of(text.module) == family]
        for module, group in groupby(own, key=lambda text: text.module):
            parts += [f"### {module}", table(["class", "text"], [_row(text) for text in group])]
    return "\n\n".join(parts) + "\n"


def _row(text: ErrorText) -> list[str]:
    return [text.error, code(text.text)]
