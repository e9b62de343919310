"""Tests, and the type checker that they apply to every annotated function of the package."""

from beartype import BeartypeConf, beartype

# An int where a float is asked for is right (PEP 484's numeric tower), as it is for mypy.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
