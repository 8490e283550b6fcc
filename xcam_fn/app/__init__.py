"""The page of `xcam app`."""
