"""Other libraries' public names over this library's functions, so that one import line is all that changes."""
