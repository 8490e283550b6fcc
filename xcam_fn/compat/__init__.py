"""Other libraries' public names over `xcam_fn`: change one import. No other room imports this one."""
