"""Stand-ins with the structure of the public code bases, for tests.

Class, attribute and parameter names and the containers that forward takes and returns are those of
the public code, so that recognition and checkpoints can be tested with none of it installed.
"""
