"""Inputs: where the source guest comes from. A module per type, with the contract beside them."""
