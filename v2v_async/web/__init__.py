"""``--serve``: a batch as a page, as JSON, as a stream of events and for Prometheus.

::

    event ─> BatchState.apply ─> Feed ─┬─> EventQueue, one for each reader of /api/events
                                       └─> Changed, one for each page (/api/changes)
                    └── asked when somebody asks: /api/state, /api/guests/NAME, /metrics

Everything runs in the supervisor's event loop and only reads. What a reader has not been sent yet
is bounded, so that one who does not read costs the run nothing. Starlette, uvicorn and
prometheus_client are optional: only :mod:`~v2v_async.web.server` may be imported without them.
"""
