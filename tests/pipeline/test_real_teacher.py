"""What a cache of the real 135M teacher must hold to: slow, on a few hundred tokens of documentation."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pipeline.batching import collate
from pipeline.cache import read_data, run_cache
from pipeline.console import Console
from pipeline.demo_text import pydoc_topics
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.test_stages import cached_events, settings, softmax

pytestmark = pytest.mark.slow


def test_bucket_targets_at_every_temperature(real_teacher: Path, tmp_path: Path) -> None:
    """p_T of every head token within 1e-2 nats, the tail's mass within 1e-2, at six temperatures."""
    data = tmp_path / "text.jsonl"
    topics = pydoc_topics()[::30]
    data.write_text("\n".join(json.dumps({"text": topic.text[:900]}) for topic in topics))
    teacher = load_model(real_teacher)
    wanted = settings(real_teacher, data, tmp_path / "cache", max_seq_len=256)
    run_cache(wanted, Console(quiet=True), teacher=teacher)
    cache, packed = LogitCache(tmp_path / "cache"), read_data(wanted, teacher)
    assert cache.num_trained_tokens > 300
    for number in range(cache.num_sequences):
        batch, row = collate(packed, [number]), cache.sequence(number)
        hidden = teacher.hidden(mx.array(batch.token_ids), documents=batch.documents).final[0]
        logits = np.array(teacher.logits(hidden), np.float64)[row.loss_mask]
        for temperature in (1.0, 1.5, 2.0, 3.0, 4.0, 8.0):
            p = softmax(logits / temperature)
            exact = np.take_along_axis(p, row.targets.head_ids[row.loss_mask], axis=1)
            head, tail = (events[row.loss_mask] for events in cached_events(cache, row, temperature))
            assert np.abs(np.log(head) - np.log(exact)).max() < 1e-2
            assert np.abs(tail - (1 - exact.sum(-1))).max() < 1e-2
