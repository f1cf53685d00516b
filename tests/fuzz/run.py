"""Coverage-guided fuzzing: `python -m tests.fuzz.run TARGET --seconds 60`; needs atheris, which Linux has.

New inputs go to runs/fuzz/TARGET/corpus, findings to runs/fuzz/TARGET; once mended, a finding goes into
tests/fuzz/seeds/TARGET as `found-...`. Memory is limited to 3 GB, an input to 10 seconds.
"""

import argparse
import random
import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["schemas", "pmetal_distill", "yaml"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutate import flipped, mutated
from tests.fuzz.seeds import FOLDER

MEMORY_BYTES = 3 << 30
MAX_INPUT_BYTES = 8192
SECONDS_PER_INPUT = 10


def main() -> None:
    """Runs one target for a while; exit code 77 and a message when something is found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    place = Path("runs/fuzz") / options.target
    (place / "corpus").mkdir(parents=True, exist_ok=True)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        change = mutated(options.target, data, draw) if draw.random() < 0.8 else flipped(data, draw)
        return change[:max_size]

    arguments = [
        sys.argv[0],
        str(place / "corpus"),
        str(FOLDER / options.target),
        f"-max_total_time={options.seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MEMORY_BYTES >> 20}",
        f"-artifact_prefix={place}/",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup(arguments, lambda data: TARGETS[options.target](data) and None, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
