"""A model behind HTTP, in the protocol of upstream's `deploy.py`. Imports nothing, as `vlaft.serving.client` needs a part."""
