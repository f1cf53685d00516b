"""Single wrong bytes in every kind of file of a cache, and in every region of a shard."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pmetal_distill.offline.pages import read_pages


@dataclass(frozen=True)
class Flip:
    """A byte of a file to be changed.

    Attributes:
        name: of the file, relative to the cache.
        region: "all" or a region of a shard.
        at: which byte.
        mask: what it is combined with by exclusive or; not 0.
    """

    name: str
    region: str
    at: int
    mask: int

    @property
    def kind(self) -> str:
        """Kind of file and region."""
        folder, _, name = self.name.rpartition("/")
        kind = name.split("-")[0] if folder in ("shards", "bases") else folder or name
        return kind if self.region == "all" else f"{kind} {self.region}"

    def apply(self, folder: Path) -> None:
        """Changes the byte; a second time changes it back."""
        path = folder / self.name
        data = bytearray(path.read_bytes())
        data[self.at] ^= self.mask
        path.write_bytes(data)


def flips(pristine: Path, names: list[str], seed: int) -> Iterator[Flip]:
    """Endless: the kinds of files and regions take turns, the byte is drawn."""
    draw = random.Random(seed)
    places = [(name, region, spans) for name in names for region, spans in regions(pristine / name).items()]
    kinds = sorted({Flip(name, region, 0, 1).kind for name, region, _ in places})
    while True:
        for kind in kinds:
            fitting = [p for p in places if Flip(p[0], p[1], 0, 1).kind == kind]
            name, region, spans = draw.choice(fitting)
            start, stop = draw.choice(spans)
            yield Flip(name, region, draw.randrange(start, stop), draw.randrange(1, 256))


def regions(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Byte ranges by region."""
    size = path.stat().st_size
    if path.suffix != ".parquet":
        return {"all": [(0, size)]}
    meta = pq.ParquetFile(path).metadata
    headers, data = [], []
    with path.open("rb") as file:
        for group in range(meta.num_row_groups):
            for column in range(meta.num_columns):
                chunk = meta.row_group(group).column(column)
                for page in read_pages(file, chunk.data_page_offset, chunk.total_compressed_size, where="x"):
                    start = page.offset + page.header_bytes
                    headers.append((page.offset, start))
                    data.append((start, start + page.packed_bytes))
    return {
        "magic": [(0, 4), (size - 4, size)],
        "page header": headers,
        "page data": data,
        "footer": [(data[-1][1], size - 8)],
        "footer length": [(size - 8, size - 4)],
    }
