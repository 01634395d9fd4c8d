"""One dial: from a text and a budget to the settings of a run that uses it well, by fitted laws.

``laws.py`` has the laws, ``choose.py`` the choice. ``text.py`` counts a text, ``level.py`` says how predictable it is,
and ``speed.py`` measures a machine. ``command.py`` is the command, and ``one_step.py`` is what train.py does with
--train.minutes.
"""
