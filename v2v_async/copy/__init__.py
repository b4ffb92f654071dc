"""The copy engine: all disks at once, through libnbd's asynchronous calls.

::

    engine (event loop) ─ negotiates, divides connections and memory, reports, flushes
      └ worker (thread) × few ─ polls its lanes
          └ lane ─ one source and one target connection; a few slots, each
                   free → reading → writing → free
              └ disk ─ hands out chunks of the disk; counts what has landed; first error
                  └ plan ─ extents to requests (pure)
"""
