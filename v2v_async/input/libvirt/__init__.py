"""``-i libvirt`` and ``-i libvirtxml``: guests that libvirt's domain XML describes."""
