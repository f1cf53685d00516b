"""The report of a cache: what it is, what the teacher knows, where the bytes go, how exact it is, a text."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.inspection import describe, error_by_stretch
from pipeline.reporting.axes import Axis
from pipeline.reporting.bars import Bar
from pipeline.reporting.cache_data import (
    Spread,
    open_heads,
    shard_errors,
    shown_sequences,
    teacher_tokens,
    uncertainty,
)
from pipeline.reporting.figures import Figure, bar_figure, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import file_size, percent, short
from pipeline.reporting.page import Report, Section, Tile, fact_list, facts
from pipeline.reporting.places import shown
from pipeline.reporting.plan_figures import PlanRow, plan_section
from pipeline.reporting.text_page import TextPage

if TYPE_CHECKING:
    from pmetal_distill.offline.reader import LogitCache

COLUMNS = {
    "tok": "input ids",
    "seq": "sequence numbers",
    "doc": "document numbers",
    "msk": "loss mask",
    "id": "head: ids",
    "top": "head: first log-probability",
    "gap": "head: log-probabilities",
    "crv": "tail curve",
    "sk": "tail sketch",
    "footers": "Parquet footers",
    "records": "commit records",
}
MEASURES = {
    "kl": ("KL(teacher ‖ cached)", "nats"),
    "gradient": ("Error of the gradient at the output layer", "relative"),
}
APART = ("hidden", "sidecars")


def cache_report(place: str, *, plan: list[PlanRow], footer: str) -> Report:
    """The report of a cache, finished or not.

    Args:
        place: folder or URL of the cache.
        plan: rows of a plan, to stand beside this cache; may be empty.
        footer: the page's last line.

    Raises:
        CacheError: it cannot be read.
    """
    described = describe(place)
    cache = open_heads(place)
    described["meta"] = {name: shown(text) for name, text in described["meta"].items()}
    teacher = described["meta"].get("teacher", "a teacher")
    return Report(
        kicker="Cache of teacher distributions",
        title=Path(teacher).name or teacher,
        subtitle=f"{shown(place)} · made from {described['meta'].get('data', 'unnamed text')}",
        tiles=_tiles(described),
        sections=[
            _uncertainty(cache),
            _text(cache),
            _errors(cache),
            _sizes(described),
            plan_section(plan, here=_here(described)),
            _facts(described),
        ],
        footer=footer,
    )


def _tiles(described: dict[str, Any]) -> list[Tile]:
    size, measured = described["bytes_per_token"], described["measured"]
    tiles = [Tile("tokens", short(described["tokens"])), Tile("shards", described["shards"])]
    if described["tokens"]:
        tiles += [
            Tile("on disk", short(round(size, 1)), "bytes a token"),
            Tile("smaller than float16 logits", short(round(described["compression"])), "times"),
            Tile("the same with bases", short(round(described["compression_with_sidecar"], 1)), "times"),
        ]
    tiles += [
        Tile(f"KL(teacher ‖ cached), T\u00a0=\u00a0{t}", f"{measured[f'kl@{t}']:.3g}", "nats")
        for t in (1, 2)
        if f"kl@{t}" in measured
    ]
    return tiles


def _facts(described: dict[str, Any]) -> Section:
    target, hidden = described["target"], described["hidden"]
    rows = {
        **{name.replace("_", " "): text for name, text in described["meta"].items()},
        "sequences": short(described["sequences"]),
        "tokens": f"{described['tokens']:,}, {described['trained_tokens']:,} with a target",
        "vocabulary": f"{target['vocab_size']:,}",
        "head": f"{target['k']} tokens a position, grid {target['logprob_step']:g} nats",
        "tail": target["tail"],
        "hidden layers": ", ".join(map(str, hidden["layers"])) if hidden else "none",
    }
    clipped = {k: v for k, v in described["measured"].items() if k.startswith("clipped")}
    rows["clipped values"] = short(sum(clipped.values()))
    prints = {name.replace("_", " "): text for name, text in described["fingerprint"].items()}
    return Section("facts", "Details", extra=[facts(rows), facts(prints, summary="Fingerprints")])


def _uncertainty(cache: "LogitCache") -> Section:
    title = "What the teacher knows"
    if not cache.num_trained_tokens:
        return Section("uncertainty", title, skipped="the cache holds no target yet")
    found = uncertainty(cache)
    lead = [
        "A higher temperature spreads the teacher's probability over the vocabulary. The entropy says how "
        "undecided it is, the tail how much lies outside the tokens that are kept one by one.",
        f"Lines are means over {found.tokens:,} sampled tokens, bands the middle 80 % of them.",
    ]
    if cache.spec.tail == "none":
        lead.append("This cache keeps no tail, so both are those of the head alone, renormalised.")
    ticks = tuple(t for t in (1.0, 2.0, 4.0, 8.0) if found.entropy[0].temperature <= t)
    x = Axis("temperature", log=True, ticks=ticks)
    first, last = found.entropy[0], found.entropy[-1]
    entropy = line_figure(
        "entropy",
        "Entropy of the teacher",
        [_band("entropy", found.entropy)],
        x,
        Axis("nats", from_zero=True),
        description=f"Mean entropy rises from {short(first.mean)} nats at T = {first.temperature:g} to "
        f"{short(last.mean)} at T = {last.temperature:g}.",
        note=f"All tokens equally likely: {math.log(cache.spec.vocab_size):.2f} nats.",
    )
    low, high = found.tail[0], found.tail[-1]
    tail = line_figure(
        "tail-mass",
        f"Probability outside the first {cache.spec.k} tokens",
        [_band("tail", found.tail)],
        x,
        Axis("share of the probability", ticks=(0.0, 0.25, 0.5, 0.75, 1.0)),
        description=f"The tail's mean share is {percent(low.mean)} at T = {low.temperature:g} and "
        f"{percent(high.mean)} at T = {high.temperature:g}.",
    )
    return Section("uncertainty", title, lead, [entropy] if cache.spec.tail == "none" else [entropy, tail])


def _band(name: str, spreads: list[Spread]) -> Series:
    return Series(name, [(s.temperature, s.mean) for s in spreads], [(s.low, s.high) for s in spreads])


def _sizes(described: dict[str, Any]) -> Section:
    title = "Where the bytes go"
    columns = described["bytes_per_token_by_column"]
    if not columns:
        return Section("bytes", title, skipped="the cache holds no shard yet")
    groups: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    for name, size in columns.items():
        if name not in APART:
            group = COLUMNS.get(name, COLUMNS.get(name.rstrip("lh0123456789"), name))
            groups[group] = groups.get(group, 0.0) + size
            members.setdefault(group, []).append(f"{name} {short(round(size, 3))}")
    bars = [Bar(name, round(size, 3), ", ".join(members[name])) for name, size in groups.items()]
    total = described["bytes_per_token"]
    figure = bar_figure(
        "bytes",
        "Bytes a token, by column",
        bars,
        unit="bytes a token",
        description=f"{short(round(total, 1))} bytes a token in all; most go to "
        f"{max(groups, key=lambda name: groups[name])}.",
        note="Compressed, as the shards lie on disk. Bases and codebooks are stored once, not counted here.",
    )
    return Section(
        "bytes",
        title,
        [f"{short(round(total, 1))} bytes a token in all, input ids included."],
        [figure, tag("div", tag("h3", "In all"), _totals(described), class_="card")],
    )


def _totals(described: dict[str, Any]) -> Element:
    tokens, columns = described["tokens"], described["bytes_per_token_by_column"]
    rows = {
        "targets": file_size(tokens * described["bytes_per_token"]),
        "hidden states": file_size(tokens * columns["hidden"]) if described["hidden"] else "none",
        "bases and codebooks": file_size(tokens * columns["sidecars"]),
        "float16 logits would be": file_size(2.0 * tokens * described["target"]["vocab_size"]),
    }
    return fact_list(rows)


def _errors(cache: "LogitCache") -> Section:
    title = "How exact it is"
    figures = []
    for name, (heading, unit) in MEASURES.items():
        found = shard_errors(cache, name)
        series = [Series(f"T = {t:g}", points) for t, points in found.by_temperature.items()]
        if series:
            figures.append(_error_figure(name, heading, unit, series))
    if not figures:
        return Section(
            "errors", title, skipped="the writer measures errors of sketches only, and this cache has none"
        )
    lead = [
        "While it wrote a shard, the writer compared some of its rows with the teacher's exact distribution. "
        "A shard far above the others holds text that the calibration did not see.",
    ]
    if refitted := found.refitted:
        shown = ", ".join(map(str, refitted[:12])) + (" …" if len(refitted) > 12 else "")
        lead.append(f"Shards with a basis of their own: {shown}.")
    if unlike := [row for row in error_by_stretch(cache) if row["unlike"]]:
        shown = "; ".join(f"{row['text']} ({row['drift']:.2f} times)" for row in unlike[:12])
        more = " …" if len(unlike) > 12 else ""
        lead.append(f"Unlike the sample of the whole text, by KL at T = 2: {shown}{more}.")
    return Section("errors", title, lead, figures)


def _error_figure(name: str, heading: str, unit: str, series: list[Series]) -> Figure:
    means = [f"{s.name}: {sum(v for _, v in s.points) / len(s.points):.3g}" for s in series]
    values = [v for s in series for _, v in s.points]
    wide = min(values) > 0 and max(values) > 20 * min(values)
    return line_figure(
        f"error-{name}",
        heading,
        series,
        Axis("shard", whole=True, tight=len(series[0].points) > 1),
        Axis(unit, log=wide, from_zero=not wide),
        description=f"{heading} by shard. Means: {'; '.join(means)}.",
        note=f"Means: {'; '.join(means)}.",
    )


def _here(described: dict[str, Any]) -> PlanRow | None:
    """This cache among the rows of a plan."""
    errors = {
        float(name.partition("@")[2]): value
        for name, value in described["measured"].items()
        if name.startswith("gradient@")
    }
    return PlanRow("this cache", described["bytes_per_token"], errors, "") if errors else None


def _text(cache: "LogitCache") -> Section:
    from pmetal_distill.models import load_tokenizer

    title = "The text as the teacher saw it"
    rows = shown_sequences(cache, cache.numbers)
    if not rows:
        return Section("text", title, skipped="the cache holds no sequence yet")
    tokenizer = load_tokenizer(cache.tokenizer_path)
    texts = [(f"sequence {row.number}", teacher_tokens(row, cache, tokenizer)) for row in rows]
    page = TextPage.of("tokens", "entropy", "nats", texts)
    if page is None:
        return Section("text", title, skipped="no token of the sampled sequences has a target")
    lead = [
        "The stronger the colour and the line below a token, the less the teacher knew, one token earlier, "
        "what would come. Point at a token, tap it, or walk with the arrow keys to see what it expected.",
        "T = 1, a few sequences spread over the data.",
    ]
    return Section("text", title, lead, extra=[page.element()])
