"""RLMs behind an OpenAI-compatible chat endpoint."""
