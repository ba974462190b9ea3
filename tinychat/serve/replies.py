"""JSON that is sent."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Reply(JSONResponse):
    """A JSON value. Half a character that a client has sent, which UTF-8 cannot say again, becomes "?"."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
