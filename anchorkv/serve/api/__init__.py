"""HTTP: OpenAI's formats and anchorkv's own, translated to and from what `serve.service` takes and gives."""
