"""What is used of libraries though they do not promise to keep it: private names, and texts of their errors, one file a library.

A release may change any of it. Each use has a test in tests/compat/, which then fails and says what has changed.
"""
