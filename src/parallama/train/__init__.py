"""Training: one optimizer step is one program on the mesh.

`batch` is what a step takes in, `options` how it is done, `step.Trainer` does it:

- `Trainer(checkpoint, mesh, options, seed=...)` reads the weights and makes the state; `compile()` makes the program.
- `trainer.step(batch, lr)` is one optimizer step, `trainer.evaluate(batch)` the loss of a batch.
- `trainer.state` holds all that a checkpoint must: named device tensors. `trainer.layout(name)` says how each lies: `placement.axes` over the mesh, and `blocks`, how the laid-out dim is
  made from the checkpoint's. `trainer.fetch(name)` is one on the host in the checkpoint's layout, and `trainer.load(tensors)` puts such ones back, on any mesh.
- `trainer.host_parameters()` gives the parameters for export, and `lora.save_adapter` writes the adapter's.
"""
