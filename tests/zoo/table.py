"""The sweep's rows as lines and as the page docs/models.md."""

from tests.zoo.sweep import Row


def summary(row: Row) -> str:
    """One line."""
    cells = [row.splits, row.packs, row.exact, row.full, row.lora, row.student]
    shown = ["FAILED" if cell.startswith("!") else cell or "-" for cell in cells]
    lines = [f"{row.name:22}" + "".join(f"{cell:>11}" for cell in shown)]
    lines += [f"    {column}: {why}" for column, why in row.failures.items()]
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    return ""
