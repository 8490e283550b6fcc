"""Other libraries' public names on top of this library's methods: only the import line changes.

Each package has the public import paths of the library it is named after. Its objects remember only their
arguments. No other room imports this one.
"""
