"""What stage one learns from a sample before it writes: the codebook's frequencies and predictor.

The sample is spread over the whole data set. Where it would be a good part of the data, all of it is read and
the teacher's states are kept for the main pass, so that calibration costs no second forward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.teacher import TeacherRunner, TeacherStates

CODEBOOK_TOKENS = 4096
KEEP_ALL_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """Which sequences calibrate.

    Attributes:
        num_tokens: trained positions wanted.
        seed: of the draw.
    """

    num_tokens: int
    seed: int = 0

    def states(self, runner: TeacherRunner) -> Iterator[TeacherStates]:
        """The teacher's states of the sample, sequence by sequence."""
        data = runner.dataset
        if KEEP_ALL_FACTOR * self.num_tokens >= data.num_targets:
            runner.keep_tokens = data.num_targets
            yield from runner.run(range(data.num_sequences), keep=True)
        else:
            yield from runner.sample(data.sample_sequences(self.num_tokens, seed=self.seed).tolist())
