"""A script of XplainCAM: see `scripts`."""

from xcam_fn.compat.xplaincam.scripts import start

if __name__ == "__main__":
    start("drop_increase_evaluation")
