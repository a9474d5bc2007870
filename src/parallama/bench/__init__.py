"""Measuring: speed beside the peers and beside the machine's limits."""
