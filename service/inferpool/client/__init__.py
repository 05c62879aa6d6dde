"""The Python client: arrays, data frames, pictures and sentences in, arrays out.

`Client` blocks and `AsyncClient` is for asyncio; `core` holds the logic of both, and does no input or output.
"""

from inferpool.client.answer import Prediction, ServerUnreachable, UnexpectedAnswer
from inferpool.client.async_client import AsyncClient
from inferpool.client.metadata import Metadata
from inferpool.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "Metadata", "Prediction", "ServerUnreachable", "UnexpectedAnswer"]
