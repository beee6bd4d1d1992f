"""Polyrank's library. Each subpackage is one layer of docs/architecture.md and imports only downward."""

__version__ = "0.1.0"
