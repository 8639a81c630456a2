"""What every request passes: refuses what has no access, and puts the security headers on every answer."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onward.views.page.access import COOKIE, SAFE_METHODS, Key
from onward.views.page.answers import refusal
from onward.views.page.pages import closed_page, enter_page
from onward.views.web.origin import Hosts, is_foreign

POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
STATIC = "/static/"
"""The folder of styles and scripts, which show nothing of a run; the page that explains how to get in needs them."""


class RequireAccess:
    """ASGI middleware: nobody but those with access reaches the application.

    Args:
        app: the application behind it.
        key: the token.
        hosts: names that the page answers to.
        read_only: refuse everything but reading.
    """

    def __init__(self, app: ASGIApp, key: Key, hosts: Hosts, *, read_only: bool) -> None:
        self._app = app
        self._key = key
        self._hosts = hosts
        self._read_only = read_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._refusal(scope) or self._entry(scope) or self._closed(scope)
            await (answer or self._app)(scope, receive, _with_headers(send, scope["path"]))

    def _refusal(self, scope: Scope) -> Response | None:
        """Refuse requests that no token could make acceptable."""
        headers = Headers(scope=scope)
        if not self._hosts.know(headers.get("host", "")):
            return refusal(403, "this page has no such host name", "Open the link that onward page printed.")
        if is_foreign(headers):
            return refusal(403, "another site made this request", "Use the page itself, or a token in the header.")
        if self._read_only and scope["method"] not in SAFE_METHODS:
            return refusal(403, "this page is read-only", "Start it without --read-only.")
        return None

    def _entry(self, scope: Scope) -> Response | None:
        """Turn the token of the link into a cookie, and redirect to the same page without it."""
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        token = dict(query).get("token")
        if token is None or "/api/" in scope["path"] or not self._key.is_token(token):
            return None
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        # a single slash: two would name another host
        target = "/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else "")
        site = Headers(scope=scope).get("sec-fetch-site", "none")
        # a browser that came from another site sends no strict cookie to the target of a redirect
        answer = RedirectResponse(target, 303) if site in ("none", "same-origin") else enter_page(target)
        answer.set_cookie(cookie_name(scope), self._key.cookie, httponly=True, samesite="strict", path="/")
        return answer

    def _closed(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["path"].startswith(STATIC) or self._key.is_in_header(headers):
            return None
        if self._key.is_in_cookie(headers, cookie_name(scope)):
            if scope["method"] in SAFE_METHODS or "origin" in headers:
                return None
            return refusal(
                403, "a request that changes something must say where it comes from", "Send an Origin header."
            )
        if "text/html" in headers.get("accept", "") and "/api/" not in scope["path"]:
            return closed_page()
        return refusal(
            401, "the token is missing or wrong", "Authorization: Bearer TOKEN, as in the link.",
            **{"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def cookie_name(scope: Scope) -> str:
    """Return the cookie's name: browsers share cookies between ports of one host."""
    server = scope.get("server")
    return f"{COOKIE}_{server[1]}" if server else COOKIE


def _with_headers(send: Send, path: str) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if path.startswith(STATIC):
                headers["Cache-Control"] = "no-cache"  # cached, but revalidated each time
        await send(message)

    return wrapped
