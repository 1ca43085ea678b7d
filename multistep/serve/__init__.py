"""bundle -> HTTP. Needs the extra `serve`; never imports training."""

from multistep.serve.app import create_app
from multistep.serve.limits import Settings, token_of
from multistep.serve.server import serve

__all__ = ["Settings", "create_app", "serve", "token_of"]
