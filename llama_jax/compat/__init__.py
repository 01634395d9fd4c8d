"""Uses of what libraries do not promise to keep, such as private names and texts of errors. Each library has a file.

Any release may change them. Each use has a test in tests/compat/, which then fails and says what has changed.
"""
