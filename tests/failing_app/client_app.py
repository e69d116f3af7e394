"""Clients that nobody asks anything."""

from flwr.clientapp import ClientApp

app = ClientApp()
