"""A plan put on a model: cut, transferred, loaded and re-sharded."""
