"""Programs and results held against the plan, the checkpoint and transformers."""
