"""`python -m dtpm_fast.data`: look at the degradations, check a data set."""

import sys

from dtpm_fast.data.command import main

sys.exit(main())
