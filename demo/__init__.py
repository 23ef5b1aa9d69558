"""Image chat in the browser and an OpenAI-compatible server."""
