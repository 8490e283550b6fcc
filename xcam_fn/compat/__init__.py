"""Other libraries' classes and functions under their own names, made of ours; nothing below imports this."""
