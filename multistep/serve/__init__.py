"""bundle -> HTTP. Needs the extra `serve`; never imports training."""

from multistep.serve.app import create_app, serve

__all__ = ["create_app", "serve"]
