"""In and out: other people's checkpoints become ours, and ours become theirs."""
