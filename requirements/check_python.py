"""Whether a Python can run this project; exit status 1 if not. It must itself run on old Pythons.

python requirements/check_python.py            # is it recent enough?
python requirements/check_python.py checkout   # and does it find this checkout's packages, not another one's?
"""

import os
import sys


if sys.version_info < (3, 11):  # noqa: UP036 - the question of this script
    sys.exit(1)
if "checkout" in sys.argv[1:]:
    from importlib.util import find_spec

    del sys.path[0]  # this script's folder
    spec = find_spec("unsloth_ext")
    if spec is None or not os.path.samefile(os.path.dirname(spec.origin), "unsloth_ext"):
        sys.exit(1)
