"""Who may read and who may act: the token, and the cookie in its place."""

from __future__ import annotations

import hmac
import secrets
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from onward.views.web.origin import bearer

COOKIE = "onward_page"
TOKEN_BYTES = 32
SAFE_METHODS = ("GET", "HEAD")


class Key:
    """The token of a page, and the value of the cookie that a browser gets for it.

    Args:
        token: the secret; random if none is given.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(TOKEN_BYTES)
        self.cookie = hmac.new(self.token.encode(), b"onward page: cookie", sha256).hexdigest()

    def is_token(self, text: str) -> bool:
        """Return whether a text is the token, compared in constant time."""
        return hmac.compare_digest(text.encode(errors="replace"), self.token.encode())

    def is_in_header(self, headers: Headers) -> bool:
        """Return whether a request has the token as `Authorization: Bearer TOKEN`."""
        return self.is_token(bearer(headers))

    def is_in_cookie(self, headers: Headers, name: str) -> bool:
        """Return whether a request has the cookie."""
        # as browsers send them: other programs on this machine set cookies, too, of forms that http.cookies gives up on
        value = cookie_parser(headers.get("cookie", "")).get(name, "")
        return hmac.compare_digest(value.encode(errors="replace"), self.cookie.encode())
