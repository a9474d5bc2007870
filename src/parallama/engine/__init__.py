"""What runs steps on devices. `interface` is the door; `torch_xla` is the engine behind it."""
