"""Untrusted files in and out: configs, weights, tokenizers, chat templates, exports."""
