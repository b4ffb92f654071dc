"""Warm migration: the disks are copied while the guest runs, then what it changes meanwhile."""
