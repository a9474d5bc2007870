"""An OpenAI-compatible server over HTTP."""
