"""The convert step: virt-v2v-in-place on the source's overlays, and what it tells of the target."""

from v2v_async.convert.step import convert

__all__ = ["convert"]
