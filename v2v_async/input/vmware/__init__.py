"""``-ic vpx://`` and ``esx://``: guests of a vCenter or an ESXi, over HTTPS or with VDDK."""
