"""Training: one optimizer step is one program on the mesh.

`trainer.make_trainer` makes what does the steps. `loop` is a whole run: data, steps, validation,
log and checkpoints.
"""
