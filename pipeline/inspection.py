"""What is in a cache, and what the teacher said at one position, as text. Costs one row group."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.console import aligned, table
from schemas.errors import UsageError

if TYPE_CHECKING:
    from pmetal_distill.offline.batch import StoredSequence
    from pmetal_distill.offline.reader import LogitCache

CONTEXT_TOKENS = 48
SHOWN_STRETCHES = 12
SIZES = {
    "bytes_per_token": "bytes/token",
    "sidecar_bytes": "bytes of sidecars",
    "bytes_per_token_with_sidecar": "bytes/token with sidecars",
    "refit_bytes_per_token": "bytes/token of further bases",
    "compression": "times smaller than float16 logits",
    "compression_with_sidecar": "the same with sidecars",
}
"""Names of what `size_of` gives, in the order in which they are shown."""


def describe(folder: Path | str) -> dict[str, Any]:
    """The cache's description, size by column and measured errors; works on unfinished caches too."""
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(folder, allow_partial=True, verify_hashes="never")
    dataset = cache.dataset
    columns = cache.bytes_per_token() if cache.num_tokens else {}
    size = size_of(cache, columns) if columns else {"bytes_per_token": 0}
    return {
        "cache": str(folder),
        "shards": f"{len(cache.records)} of {dataset.num_shards}",
        "sequences": cache.num_sequences,
        "tokens": cache.num_tokens,
        "trained_tokens": cache.num_trained_tokens,
        "target": dataset.target.to_json(),
        "hidden": dataset.hidden.to_json() if dataset.hidden else None,
        "bases": list(cache.basis_names),
        **size,
        "bytes_per_token_by_column": columns,
        "measured": measured(cache),
        "stretches": error_by_stretch(cache),
        "fingerprint": dataset.fingerprint,
        "meta": dataset.meta,
    }


def size_of(cache: "LogitCache", columns: dict[str, float]) -> dict[str, float]:
    """Bytes a token and how many times smaller than float16 logits, without the sidecars and with them.

    `refit_bytes_per_token` is what all bases but one weigh, over all tokens.
    """
    apart = ("sidecars", "hidden")
    on_disk = sum(size for name, size in columns.items() if name not in apart)
    full = 2 * cache.dataset.target.vocab_size
    bases = {ref.name: ref.num_bytes for record in cache.records if (ref := record.basis)}
    further = sum(bases.values()) - max(bases.values(), default=0)
    return {
        "bytes_per_token": on_disk,
        "sidecar_bytes": round(columns["sidecars"] * cache.num_tokens),
        "bytes_per_token_with_sidecar": on_disk + columns["sidecars"],
        "refit_bytes_per_token": further / cache.num_tokens,
        "compression": full / on_disk,
        "compression_with_sidecar": full / (on_disk + columns["sidecars"]),
    }


def measured(cache: "LogitCache") -> dict[str, float]:
    """Means over shards of what the writer measured; clipped values are summed."""
    names = sorted({name for record in cache.records for name in record.measured})
    result = {}
    for name in names:
        values = [record.measured[name] for record in cache.records if name in record.measured]
        result[name] = float(np.sum(values) if name.startswith("clipped") else np.mean(values))
    return result


def error_by_stretch(cache: "LogitCache") -> list[dict[str, Any]]:
    """Errors of each run of shards that was judged together, or of each quarter of shorter text.

    Each has `text`, which part it is; `kl@1` and `kl@2` on its own text; `drift`, its KL at T = 2 in
    multiples of that of the sample of the whole text, None in older caches; `refitted`, whether it has a
    basis of its own; and `unlike`, whether the drift is beyond the bound.
    """
    from pmetal_distill.offline.calibrate import DRIFT_FACTOR

    found: list[dict[str, Any]] = []
    for _, group in groupby(cache.records, key=lambda r: [r.measured.get(n) for n in _OF_A_STRETCH]):
        records = list(group)
        values = records[0].measured
        if "kl@2" not in values:
            continue
        parts = sorted({name.partition(".")[0] for name in values if name.startswith("part")})
        if not parts:
            text = f"shards {records[0].shard} to {records[-1].shard}"
            found.append({"text": text, "kl@1": values.get("kl@1"), "kl@2": values["kl@2"]})
            found[-1] |= {"drift": values.get("drift"), "refitted": bool(values.get("refitted"))}
        elif not found:  # the same in all shards
            for part in parts:
                kl = values[f"{part}.kl@2"]
                found.append({"text": f"quarter {part[4:]}", "kl@1": values.get(f"{part}.kl@1"), "kl@2": kl})
                found[-1] |= {"drift": kl / values["kl@2"] if values["kl@2"] else None, "refitted": False}
    return [row | {"unlike": (row["drift"] or 0.0) > DRIFT_FACTOR} for row in found]


_OF_A_STRETCH = ("kl@1", "kl@2", "drift", "refitted")


def stretches_text(rows: list[dict[str, Any]]) -> str:
    """`error_by_stretch` for people: of many, those furthest from the sample; empty where there is one."""
    if len(rows) < 2:
        return ""
    shown = sorted(rows, key=lambda row: -(row["drift"] or 0.0))[:SHOWN_STRETCHES]
    columns = ["KL(teacher || cached)", "T=1", "T=2", "times the sample's", ""]
    lines = []
    for row in [row for row in rows if row in shown]:
        remarks = ["a basis of its own"] * row["refitted"] + ["unlike the sample"] * row["unlike"]
        drift = "" if row["drift"] is None else row["drift"]
        lines.append([row["text"], row["kl@1"], row["kl@2"], drift, ", ".join(remarks)])
    text = table(columns, lines)
    return text if len(shown) == len(rows) else f"{text}\nand {len(rows) - len(shown)} stretches nearer to it"


def describe_text(facts: dict[str, Any]) -> str:
    """`describe` for people."""
    simple = ("cache", "shards", "sequences", "tokens", "trained_tokens", *SIZES)
    target, columns = facts["target"], facts["bytes_per_token_by_column"]
    lines = [(SIZES.get(name, name.replace("_", " ")), facts[name]) for name in simple if name in facts]
    lines += [
        ("vocabulary", target["vocab_size"]),
        ("head", f"top {target['k']} log-probabilities, grid {target['logprob_step']:g} nats"),
        ("tail", target["tail"]),
        ("bases", ", ".join(facts["bases"]) or "none"),
        ("hidden layers", facts["hidden"]["layers"] if facts["hidden"] else "none"),
        *((name, value) for name, value in facts["meta"].items()),
    ]
    parts = [
        aligned(lines),
        table(["column", "bytes a token"], [[n, round(v, 3)] for n, v in columns.items()]),
    ]
    if facts["measured"]:
        shown = [[name, value] for name, value in facts["measured"].items() if not name.startswith("part")]
        parts.append(table(["measured while caching", ""], shown))
    if by_stretch := stretches_text(facts["stretches"]):
        parts.append(by_stretch)
    return "\n\n".join(parts)


def look(folder: Path | str, *, sequence: int, position: int, temperature: float, top: int) -> dict[str, Any]:
    """The teacher's view of the token behind a position.

    Raises:
        UsageError: no such sequence or position, or a temperature that is not positive.
    """
    from pmetal_distill.models import load_tokenizer
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(folder, allow_partial=True)
    if sequence not in cache.numbers:
        raise UsageError(f"sequence: must be one of the {cache.num_sequences} in the cache, found {sequence}")
    row = cache.sequence(sequence)
    if not 0 <= position < len(row):
        raise UsageError(
            f"position: must be from 0 to {len(row) - 1} in sequence {sequence}, found {position}"
        )
    tokenizer = load_tokenizer(cache.tokenizer_path)
    probabilities, tail = head_probabilities(cache, row, position, temperature)
    ids = row.targets.head_ids[position]
    shown = [
        {"token_id": int(i), "text": tokenizer.decode([int(i)]), "probability": float(p)}
        for i, p in zip(ids[:top], probabilities[:top], strict=False)
    ]
    start = max(0, position + 1 - CONTEXT_TOKENS)
    next_id = int(row.token_ids[position + 1]) if position + 1 < len(row) else None
    return {
        "sequence": sequence,
        "position": position,
        "document": int(row.documents[position]),
        "trained": bool(row.loss_mask[position]),
        "context": tokenizer.decode(row.token_ids[start : position + 1].tolist()),
        "next_in_text": None if next_id is None else tokenizer.decode([next_id]),
        "temperature": temperature,
        "top": shown if row.loss_mask[position] else [],
        "tail_probability": tail,
    }


def head_probabilities(
    cache: "LogitCache", row: "StoredSequence", position: int, temperature: float
) -> tuple[np.ndarray[Any, Any], float]:
    """Probabilities of the head at a temperature, and of the tail."""
    from pmetal_distill.target import TeacherTarget

    one = row.targets[position : position + 1]
    spec = cache.spec
    import mlx.core as mx

    ids, logprobs = mx.array(one.head_ids), mx.array(one.head_logprobs)
    if spec.tail == "none":
        target = TeacherTarget.none(ids, logprobs, vocab_size=spec.vocab_size)
    else:
        target = TeacherTarget.bucket(ids, logprobs, mx.array(one.tail_curve), curve=spec.curve)
    events = np.exp(np.array(target.at(temperature).events())[0])
    return events[:-1], float(events[-1])


def look_text(view: dict[str, Any]) -> str:
    """`look` for people."""
    head = aligned(
        [
            ("sequence", view["sequence"]),
            ("position", view["position"]),
            ("document", view["document"]),
            ("trained", "yes" if view["trained"] else "no: no target is kept here"),
            ("context", repr(view["context"])),
            ("next in the text", repr(view["next_in_text"])),
        ]
    )
    if not view["trained"]:
        return head
    rows: list[list[Any]] = [[repr(t["text"]), t["token_id"], f"{t['probability']:.4f}"] for t in view["top"]]
    rows.append(["all others", "", f"{1 - sum(t['probability'] for t in view['top']):.4f}"])
    return head + "\n\n" + table([f"teacher at T={view['temperature']:g}", "id", "probability"], rows)
