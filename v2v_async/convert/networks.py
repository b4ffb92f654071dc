"""Where the target's network interfaces go: ``--mac``, ``-n`` and ``-b``.

A ``--mac`` for exactly this interface wins; then a mapping of the network (for a network) or bridge
(for a bridge) by name; then the default mapping of that kind. Otherwise nothing changes. A default
keeps the kind: ``-b OUT`` sends bridges to the *bridge* OUT, as virt-v2v does.

Source: virt-v2v(1), "Networks and bridges".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from v2v_async.errors import UsageError
from v2v_async.model import Nic, VnetType
from v2v_async.options import Mapping, NetworkOptions


class NetworkMap:
    """The mappings of one command line.

    Raises:
        UsageError: two of them are about the same MAC address, network, bridge or default.
    """

    def __init__(self, options: NetworkOptions) -> None:
        self._macs: dict[str, tuple[VnetType, str]] = {}
        for mapping in options.macs:
            if mapping.kind == "ip":
                continue
            mac = mapping.mac.lower()
            if mac in self._macs:
                raise UsageError(f"--mac is given twice for {mac}")
            self._macs[mac] = (mapping.kind, mapping.out)
        self._names: dict[VnetType, dict[str | None, str]] = {
            "network": _by_name("-n", options.networks),
            "bridge": _by_name("-b", options.bridges),
        }

    def map(self, nic: Nic) -> Nic:
        """Return where ``nic`` goes; ``original_vnet`` is kept where it changes."""
        kind, vnet = nic.vnet_type, nic.vnet
        exact = self._macs.get(nic.mac.lower()) if nic.mac else None
        if exact is not None:
            kind, vnet = exact
        else:
            names = self._names[kind]
            vnet = names.get(vnet, names.get(None, vnet))
        if (kind, vnet) == (nic.vnet_type, nic.vnet):
            return nic
        original = nic.original_vnet if nic.original_vnet is not None else nic.vnet
        return nic.model_copy(update={"vnet_type": kind, "vnet": vnet, "original_vnet": original})

    def unused_macs(self, nics: Iterable[Nic]) -> list[str]:
        """Return the MAC addresses of ``--mac`` that no interface has: a typing error, mostly."""
        present = {nic.mac.lower() for nic in nics if nic.mac}
        return [mac for mac in self._macs if mac not in present]


def _by_name(option: str, mappings: Sequence[Mapping]) -> dict[str | None, str]:
    names: dict[str | None, str] = {}
    for name, out in mappings:
        if name in names:
            what = f"‘{name}’" if name is not None else "all others"
            raise UsageError(f"{option} is given twice for {what}")
        names[name] = out
    return names
