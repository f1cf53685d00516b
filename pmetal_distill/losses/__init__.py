"""Losses on the teacher's complete distribution: divergences, labels, hidden states, and the chunked head."""
