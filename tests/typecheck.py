"""beartype as the tests use it: an int serves as a float, as PEP 484 says."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
