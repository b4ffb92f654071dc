"""One event stream, many ways to show it.

::

    Reporter ── emit ──> Broadcast ──> Terminal   a person at a terminal
                            ├────────> Plain      a file, a pipe, a CI log
                            ├────────> Machine    --machine-readable
                            └────────> JsonLines  --events

A renderer is a context manager that is called with each event. It may raise: the broadcast
drops it, says so once to the others, and the run goes on.
"""
