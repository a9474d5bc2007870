"""The optimizer step on torch-xla, as one program; `train.trainer` is the way in."""
