"""``-i vmx``: VMware's VMX files and VMDK disks, here or over ssh; see ``guest.py``."""
