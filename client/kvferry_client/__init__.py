"""What a worker imports: connect, send, receive, and windows as arrays."""

from kvferry_client.aio import AsyncClient, AsyncReceiving, AsyncSending
from kvferry_client.board import BoardTrouble
from kvferry_client.sync import Client, Receiving, Sending, connect
from kvferry_client.views import Pool, Run, WindowView
from kvferry_proto.errors import Code, Fault, FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.states import Mode, Role, StallReason, State

__all__ = [
    "AsyncClient",
    "AsyncReceiving",
    "AsyncSending",
    "BoardTrouble",
    "Client",
    "Code",
    "Dtype",
    "Fault",
    "FerryError",
    "Layout",
    "Mode",
    "Order",
    "Plane",
    "Pool",
    "Receiving",
    "Role",
    "Run",
    "Sending",
    "StallReason",
    "State",
    "WindowView",
    "connect",
]
