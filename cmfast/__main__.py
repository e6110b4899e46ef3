# SPDX-License-Identifier: MIT
"""`python -m cmfast`: see `cmfast.cli.installed`."""

from cmfast.cli.installed import main

if __name__ == "__main__":
    main()
