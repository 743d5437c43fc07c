"""Settings of the whole suite."""

from hypothesis import settings

# Machines that run tests are busy ones: a deadline would make slow look like wrong.
settings.register_profile("anchorkv", deadline=None)
settings.load_profile("anchorkv")
