"""A model behind HTTP, in the protocol of upstream's `deploy.py`. Imports nothing, as its client needs a part."""
