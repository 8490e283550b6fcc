"""Other libraries' public names over this library's functions: one import line is all that changes."""
