"""Measuring copies: the same work by several programs, in turn, on the same servers.

::

    suite (TOML) ──> runner ── for each round, for each contestant in turn:
                        │        fresh target, servers ──> contestant, timed ──> servers end
                        ▼
                     report (JSON) ──> table, plot
"""
