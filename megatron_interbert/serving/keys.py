"""Check who may read and who may change items, by the key in INTERBERT_API_KEY."""

import secrets
from typing import Annotated

from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from megatron_interbert.serving.config import ServeConfig

Sent = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="INTERBERT_API_KEY")),
]


class Keys:
    """Check the keys of requests against INTERBERT_API_KEY, in constant time."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def may_write(self, sent: Sent = None) -> None:
        """Raise HTTPException 403 if the service has no key, 401 unless the request has it."""
        if not self.config.api_key:
            raise HTTPException(
                403, "items cannot be changed: the service was started without INTERBERT_API_KEY"
            )

        self._compare(sent)

    def may_read(self, sent: Sent = None) -> None:
        """Raise HTTPException 401 if reads are protected and the request does not have the key."""
        if self.config.protect_reads:
            self._compare(sent)

    def _compare(self, sent: HTTPAuthorizationCredentials | None) -> None:
        given = sent.credentials if sent else ""
        if not secrets.compare_digest(given.encode(), self.config.api_key.encode()):
            raise HTTPException(
                401,
                "wrong or missing key; send Authorization: Bearer KEY",
                {"www-authenticate": "Bearer"},
            )
