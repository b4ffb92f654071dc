"""``-i ova``: OVA files and folders; see ``guest.py``."""
