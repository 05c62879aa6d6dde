from inferpool.client import AsyncClient as AsyncClient
from inferpool.client import Client as Client
from inferpool.client import Prediction as Prediction

__version__: str
