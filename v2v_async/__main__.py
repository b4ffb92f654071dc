"""``python -m v2v_async`` is ``v2v-async``."""

import sys

from v2v_async.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
