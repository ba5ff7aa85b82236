"""``python -m clat``, for ``accelerate launch -m clat train ...`` on several devices."""

import sys

from clat.cli.main import main

sys.exit(main())
