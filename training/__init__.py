"""Stage I, stage II, the loop, checkpoints and distributed training."""
