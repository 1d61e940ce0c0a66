"""`python -m jiio`: the command line."""

import sys

from jiio.app.main import main

sys.exit(main())
