"""``python -m cryoem.cli``."""

from . import app

app()
