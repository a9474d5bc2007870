"""Texts continued: sessions, streams, the LLM, conversations."""
