"""Other libraries' public names over `xcam_fn`: change one import, keep the code. Nothing else imports this room."""
