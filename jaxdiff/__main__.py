import sys

from jaxdiff import cli

sys.exit(cli.main())
