"""Addresses that end with a name, which whoever made the file or the folder has chosen."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class NameRoute(Route):
    """A route whose path parameter `name` takes any characters; a line end matches none of Starlette's.

    What such a name may be is for `endpoint` to judge: it gets every request, and no name is an unknown address.
    """

    def __init__(
        self, folder: str, endpoint: Callable[[Request], Awaitable[Response]], *, methods: Collection[str]
    ) -> None:
        super().__init__(f"{folder}/{{name:path}}", endpoint, methods=methods)
        self.path_regex = re.compile(self.path_regex.pattern, re.DOTALL)
