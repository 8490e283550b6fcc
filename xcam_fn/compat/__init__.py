"""Other libraries' public names, made of this library's methods: one import line is all that changes.

Each package has the public import paths of the library that it is named after; its objects remember their
arguments, and nothing else. Nothing below imports this room.
"""
