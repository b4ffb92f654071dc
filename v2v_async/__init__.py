"""Move virtual machines to KVM: a supervisor for virt-v2v that copies all disks at once.

The package is built in floors; a module imports only from floors below its own (see
``docs/architecture.md``; import-linter holds it to that).
"""

__version__ = "0.1.0"
