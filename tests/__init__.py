"""Tests, and the type checker that is applied to every annotated function of the package."""

from beartype import BeartypeConf, beartype

# An int is accepted where a float is expected (PEP 484's numeric tower), as in mypy.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
