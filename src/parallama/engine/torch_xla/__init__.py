"""The engine on torch-xla: devices, programs, and the functional steps of a model."""
