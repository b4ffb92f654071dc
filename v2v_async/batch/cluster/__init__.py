"""Guests of a batch on the workers of a dask.distributed cluster, in place of this process.

::

    supervisor                        scheduler (dask)        worker process
    Runner ─> RemoteGuest ─> Cluster ─── run(answer) ───────> Host ─> Session ─> Attempt ─> work
                  │                                             │  a thread with a loop of its own
                  └── hold(resource) ────> places ────────────> │  one dask task for each turn
    emit <──────────── events, answers <── a topic <──────────── Outbox, ten times a second at most

The supervisor decides everything: turns, retries, journal. A worker does one call at a time of what
:class:`v2v_async.batch.runner.GuestWork` says. Nothing here is imported without ``--cluster``, and
``distributed`` only when a cluster is opened.
"""
