"""A script of XplainCAM's: see `scripts`."""

from xcam_fn.compat.xplaincam.scripts import start

if __name__ == "__main__":
    start("del_inser_evaluation")
