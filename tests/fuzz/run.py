"""Coverage-guided fuzzing: `python -m tests.fuzz.run TARGET --seconds 60`; needs atheris, which Linux has.

It begins with the seeds and with tests/fuzz/corpus/TARGET.zip. New inputs go to runs/fuzz/TARGET/corpus and
findings to runs/fuzz/TARGET; once mended, a finding goes into tests/fuzz/seeds/TARGET as `found-...`.
`--minimise` makes the zip again: few inputs that reach all that those in runs/ reach. Memory is limited to
3 GB, an input to 10 seconds of processor time.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["schemas", "pmetal_distill", "yaml"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.corpus import read_corpus, write_corpus
from tests.fuzz.mutate import flipped, mutated
from tests.fuzz.seeds import FOLDER as SEEDS

MEMORY_BYTES = 3 << 30
MAX_INPUT_BYTES = 8192
SECONDS_PER_INPUT = 10
SECONDS_OF_WAITING = 100  # by the clock, which runs on where other programs have the processor


def main() -> None:
    """Runs one target for a while; exit code 77 and a message when something is found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--minimise", action="store_true")
    options, of_fuzzer = parser.parse_known_args()
    place = Path("runs/fuzz") / options.target
    if options.minimise:
        _minimise(options.target, place)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    inputs = place / "corpus"
    inputs.mkdir(parents=True, exist_ok=True)
    for name, content in read_corpus(options.target).items():
        (inputs / name).write_bytes(content)
    folders = [str(inputs), str(SEEDS / options.target)]
    _fuzz(options.target, place, of_fuzzer or [f"-max_total_time={options.seconds}", *folders])


def _minimise(target: str, place: Path) -> None:
    """Has libFuzzer merge the inputs, which ends its process."""
    with tempfile.TemporaryDirectory() as fewest:
        folders = [fewest, place / "corpus", SEEDS / target]
        words = [sys.executable, "-m", "tests.fuzz.run", target, "-merge=1", *map(str, folders)]
        subprocess.run(words, check=True)
        write_corpus(target, [path.read_bytes() for path in Path(fewest).iterdir()])


def _fuzz(target: str, place: Path, asked: list[str]) -> None:
    """Hands over to libFuzzer, which does not return."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        change = mutated(target, data, draw) if draw.random() < 0.8 else flipped(data, draw)
        return change[:max_size]

    arguments = [
        # libFuzzer starts it again when it merges.
        f"{sys.executable} -m tests.fuzz.run {target}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={SECONDS_OF_WAITING}",
        f"-rss_limit_mb={MEMORY_BYTES >> 20}",
        f"-artifact_prefix={place}/",
        "-print_final_stats=1",
        "-verbosity=1",
        *asked,
    ]

    def one(data: bytes) -> None:
        started = time.process_time()
        TARGETS[target](data)
        if time.process_time() - started > SECONDS_PER_INPUT:
            raise TimeoutError(f"more than {SECONDS_PER_INPUT} seconds of processor time")

    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
