"""Texts scored, and the tasks of lm-evaluation-harness."""
