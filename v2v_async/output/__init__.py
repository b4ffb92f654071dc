"""Outputs: where the target guest goes. A module per type, with the contract in ``contract.py``."""
