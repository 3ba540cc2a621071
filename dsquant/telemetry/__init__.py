"""What a run tells: the JSONL record (the source of truth), W&B, the live console and the HTML report."""
