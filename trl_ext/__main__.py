"""`python -m trl_ext`: the command line."""

import sys

from trl_ext.cli.main import main


sys.exit(main())
